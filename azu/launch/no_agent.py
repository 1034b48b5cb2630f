"""Stands in for Ray's dashboard agent on a node without a dashboard; run by its path, by a raylet.

Says that the agent's services are not in use, as Ray does when it is installed without a dashboard, and ends
with the raylet, which holds the other end of its standard input.
"""

import sys
from pathlib import Path

_NOT_IN_USE = "-1"
_SERVICES = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")


def main() -> None:
    """Write what the raylet waits for: a file for each service, named after it and the node."""
    options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
    for service in _SERVICES:
        path = Path(options["session-dir"]) / f"{service}_{options['node-id']}"
        # The raylet reads a file as soon as it is there, and dies of an empty one.
        whole = path.with_suffix(".part")
        whole.write_text(_NOT_IN_USE)
        whole.rename(path)
    sys.stdin.read()


if __name__ == "__main__":
    main()
