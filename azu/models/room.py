"""Room on the registry's disk: models leave it, the longest unused first, before it is short."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from azu.errors import Unavailable
from azu.models.sources import is_built_in, model_folder_name
from azu.units import format_bytes

log = logging.getLogger(__name__)

# The file that says which model a folder of revisions is of; its time is when the model was last used.
_NAME = "model-id"


@dataclass(frozen=True, slots=True)
class ModelRoom:
    """The folders of models below `root`, one for each; `free_bytes` stay free on their disk.

    `disk_free` returns the free bytes of a folder's disk.
    """

    root: Path
    free_bytes: int
    disk_free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free

    def note_used(self, model_id: str) -> None:
        """Note that a model is used now."""
        file = self.root / model_folder_name(model_id) / _NAME
        if file.exists():
            os.utime(file)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(model_id)

    def make(self, num_bytes: int, model_id: str, remove: Callable[[str], None]) -> None:
        """Remove models, never this one, until so many bytes may be written; `remove` is told of each.

        Raises Unavailable (code `registry_full`) where all of them are not enough.
        """
        lacking = self._lacking(num_bytes)
        if lacking <= 0:
            return
        others = [(name, file) for name, file in self._unused_first() if name != model_id]
        for name, file in others:
            log.warning("%s leaves the disk: it was not used for longest", name)
            remove(name)
            shutil.rmtree(file.parent)
            if self._lacking(num_bytes) <= 0:
                return
        raise Unavailable(
            f"the registry's disk has no room for {format_bytes(num_bytes)} beside the "
            f"{format_bytes(self.free_bytes)} that stay free",
            code="registry_full",
        )

    def _lacking(self, num_bytes: int) -> int:
        return self.free_bytes + num_bytes - self.disk_free(self.root)

    def _unused_first(self) -> Iterator[tuple[str, Path]]:
        found = sorted((file.stat().st_mtime_ns, file) for file in self.root.glob(f"*/{_NAME}"))
        for _, file in found:
            if not is_built_in(name := file.read_text()):
                yield name, file
