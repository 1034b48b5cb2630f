"""The control plane as a Serve deployment: its one replica starts and ends registry and scheduler.

It stands apart from app.py because the replica's process must not load FastAPI.
"""

import asyncio
from pathlib import Path

from actors import control_plane
from azu.config import ControlConfig
from azu.errors import Unavailable

_ANSWER_TIMEOUT_S = 10.0


def unless_changed(path: Path, config: ControlConfig) -> None:
    """Raise Unavailable if the file has another config now, because `azu serve --books` started again."""
    if ControlConfig.from_file(path) != config:
        raise Unavailable(f"{path} has changed; its readers start again")


class ControlPlane:
    """Starts the control plane and keeps it running; Serve replaces a replica that fails to."""

    def __init__(self, path: Path) -> None:
        self._path = path.expanduser()
        self._config = ControlConfig.from_file(self._path)
        control_plane.stop()  # actors of a replica that was killed
        control_plane.start(self._config)

    async def check_health(self) -> None:
        """Restart actors that died or hang; raise when the config changed."""
        unless_changed(self._path, self._config)
        await asyncio.wait_for(asyncio.to_thread(control_plane.revive, self._config), _ANSWER_TIMEOUT_S)

    def __del__(self) -> None:
        control_plane.stop()
