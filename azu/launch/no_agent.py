"""A replacement of Ray's dashboard agent on nodes without a dashboard; a raylet runs this file by its path.

It reports that the agent's services are not in use, as Ray does when it is installed without a dashboard.
It ends with the raylet, which holds the other end of its standard input.
"""

import sys
from pathlib import Path

_NOT_IN_USE = "-1"
_SERVICES = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")


def main() -> None:
    """Write the files that the raylet waits for: one for each service, named after service and node."""
    options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
    for service in _SERVICES:
        path = Path(options["session-dir"]) / f"{service}_{options['node-id']}"
        # The raylet reads a file as soon as it exists, and ends at an empty one.
        whole = path.with_suffix(".part")
        whole.write_text(_NOT_IN_USE)
        whole.rename(path)
    sys.stdin.read()


if __name__ == "__main__":
    main()
