"""The control plane as a Serve deployment: registry and scheduler live and die with its one replica."""

import asyncio
from pathlib import Path

from actors import control_plane
from azu.config import ControlConfig
from azu.errors import Unavailable

_ANSWER_TIMEOUT_S = 10.0


def unless_changed(path: Path, config: ControlConfig) -> None:
    """Raise Unavailable when the file says something else now: the books were opened anew."""
    if ControlConfig.from_file(path) != config:
        raise Unavailable(f"{path} has changed; whoever has read it starts again")


class ControlPlane:
    """Starts the control plane and keeps it up; Serve replaces a replica, and so all of it, that cannot."""

    def __init__(self, path: Path) -> None:
        self._path = path.expanduser()
        self._config = ControlConfig.from_file(self._path)
        control_plane.stop()  # what a replica left that was killed
        control_plane.start(self._config)

    async def check_health(self) -> None:
        """Start again who died; raise when one of them hangs, or when the books are others now."""
        unless_changed(self._path, self._config)
        await asyncio.wait_for(asyncio.to_thread(control_plane.revive, self._config), _ANSWER_TIMEOUT_S)

    def __del__(self) -> None:
        control_plane.stop()
