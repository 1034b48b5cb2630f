"""The process that starts and watches the control plane as the user that runs Ray.

What Ray returns is unpickled, and that runs code of any member that sent it: `azu up` does so itself only
where Ray runs as its own user. It runs this module with the head's address and the folder of its files.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from azu.config import ControlConfig
from azu.launch import serving
from azu.launch.network_process import watch
from azu.launch.network_users import NetworkUsers
from azu.launch.processes import ProcessSpec, end_with_parent, stop_signals_raised

CONTROL = "control-plane"
# It prints this once registry, scheduler and ingress have been started.
CONTROL_READY = r"^control plane started$"
_CONTROL_FILE = "control.json"
_INGRESS_FILE = "ingress.json"


def control_process(
    users: NetworkUsers,
    config: ControlConfig,
    ingress: ControlConfig,
    head: str,
    environment: Mapping[str, str],
) -> ProcessSpec:
    """Return how to start the process; it runs with the variables with which one connects to the cluster."""
    users.text_for_ray(_INGRESS_FILE, ingress.to_json())
    folder = users.text_for_ray(_CONTROL_FILE, config.to_json()).parent
    arguments = (sys.executable, "-P", "-m", "azu.launch.control_process", head, str(folder))
    return ProcessSpec(CONTROL, arguments, environment, restart=True)


def main(head: str, folder: Path) -> None:
    """Start what does not run yet, and start again what ends, until a signal arrives."""
    end_with_parent()
    config = ControlConfig.from_file(folder / _CONTROL_FILE)
    ingress = ControlConfig.from_file(folder / _INGRESS_FILE)
    with stop_signals_raised() as stop, serving.connected(head, folder, os.environ):
        serving.start(config, ingress)
        print("control plane started", flush=True)  # noqa: T201
        watch(lambda: serving.revive(config), stop)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
