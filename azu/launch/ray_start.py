"""`ray start` without the parts of Ray that azu does not use, so that a node is up in a third of the time.

Ray's own script imports the commands of Serve, jobs and state, and opens Ray Client's port wherever grpc can
be imported. With --light there is no dashboard and no grpc either: the dashboard's server and agents take
longer to import than all the rest, and a node whose agent does not answer within 30 s ends.

azu runs this file by its path, without importing azu: its command line costs as much as half of Ray.
Usage: python -P ray_start.py start [--light] OPTIONS...
"""

import os
import shlex
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LIGHT = "--light"
# Ray's own variable. Where it is 0, Ray keeps the loopback's address and listens there alone.
CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_UNUSED = ("ray.serve.scripts", "ray.util.state.state_cli", "ray.dashboard.modules.job.cli")
# The dashboard needs it.
_UNUSED_BY_LIGHT = ("grpc",)
_AGENT = "--dashboard_agent_command="
_HEAD_TIMEOUT_S = 60.0
_NODE_TIMEOUT_S = 600.0


def main() -> None:
    """Run Ray's command line; a node that joins waits for its head first."""
    # An import of a name that is None in sys.modules fails.
    is_light = LIGHT in sys.argv
    unused = (*_UNUSED, *_UNUSED_BY_LIGHT) if is_light else _UNUSED
    sys.modules.update(dict.fromkeys(unused))  # type: ignore[arg-type]
    from ray.scripts import scripts

    # Its server would be one more open port.
    scripts.get_ray_client_dependency_error = lambda: "azu has no use for Ray Client"
    if is_light:
        sys.argv.remove(LIGHT)
        _leave_out_the_dashboard()
    if os.environ.get(CLUSTERS) == "0":
        # It lets no node join where the variable is 0: it was made for systems without clusters.
        scripts.ray_constants = SimpleNamespace(**vars(scripts.ray_constants) | {"ENABLE_RAY_CLUSTER": True})
    _wait_longer_for_nodes()
    if "--address" in sys.argv:
        _wait_for_head(sys.argv[sys.argv.index("--address") + 1])
    scripts.main()


def _wait_for_head(address: str) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _HEAD_TIMEOUT_S
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=1.0).close()
        except OSError as error:
            if time.monotonic() > deadline:
                sys.exit(f"no head answers at {address}: {error}")
            time.sleep(0.05)


def _wait_longer_for_nodes() -> None:
    """Have Ray wait for a node whose agent imports for longer than the 30 s after which Ray gives up."""
    from ray._private import services

    get_node = services.get_node

    def patient(*given: Any) -> Any:
        deadline = time.monotonic() + _NODE_TIMEOUT_S
        while True:
            try:
                return get_node(*given)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    services.get_node = patient


def _leave_out_the_dashboard() -> None:
    """Start raylets with an agent that does nothing: Ray has no option to leave the dashboard's agent out."""
    from ray._private import node, services

    start_process = services.start_ray_process

    def start(command: list[str], process_type: str, **options: Any) -> Any:
        if process_type == "raylet":
            command = [_without_agent(word) if word.startswith(_AGENT) else word for word in command]
        return start_process(command, process_type, **options)

    services.start_ray_process = start
    node.Node.start_api_server = lambda self, **options: None  # noqa: ARG005


def _without_agent(option: str) -> str:
    words = shlex.split(option.removeprefix(_AGENT))
    passed_on = [word for word in words if word.startswith(("--node-id=", "--session-dir="))]
    script = str(Path(__file__).with_name("no_agent.py"))
    return _AGENT + shlex.join([sys.executable, "-S", "-E", script, *passed_on])


if __name__ == "__main__":
    main()
