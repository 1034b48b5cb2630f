"""Room on the registry's disk: models leave it, the longest unused first, before it is short."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from azu.errors import Unavailable
from azu.models.sources import is_built_in, model_folder_name
from azu.units import format_bytes

log = logging.getLogger(__name__)

# The file that says which model a folder of revisions is of; its time is when the model was last used.
_NAME = "model-id"
Model = tuple[str, str]


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

    def make(
        self,
        num_bytes: int,
        model: Model,
        in_use: Set[Model],
        remove: Callable[[str, str], None],
        cached_bytes: Callable[[str, str], int] = lambda *_: 0,
    ) -> None:
        """Remove older revisions of a model, then other models, until so many bytes may be written.

        A model is an id with a revision; none in use is removed. `remove` is told of each that is, with the
        revision "" for all of them; `cached_bytes` says what that frees beside the folder. Raises
        Unavailable (code `registry_full`) where all of them are not enough; then none is removed.
        """
        lacking = self._lacking(num_bytes)
        if lacking <= 0:
            return
        leaving = [
            (one, folder, _size(folder) + cached_bytes(*one))
            for one, folder in (*self._older(model), *self._others(model[0], {name for name, _ in in_use}))
            if one not in in_use
        ]
        is_enough = sum(size for *_, size in leaving) >= lacking
        for one, folder, _ in leaving if is_enough else ():
            log.warning("%s leaves the disk: it was not used for longest", "@".join(filter(None, one)))
            remove(*one)
            shutil.rmtree(folder)
            if self._lacking(num_bytes) <= 0:
                return
        raise Unavailable(
            f"the registry's disk has no room for {format_bytes(num_bytes)} beside the "
            f"{format_bytes(self.free_bytes)} that stay free",
            code="registry_full",
        )

    def _lacking(self, num_bytes: int) -> int:
        return self.free_bytes + num_bytes - self.disk_free(self.root)

    def _older(self, model: Model) -> Iterator[tuple[Model, Path]]:
        model_id, revision = model
        for folder in sorted((self.root / model_folder_name(model_id)).glob("*/")):
            if folder.name != revision and not is_built_in(model_id):
                yield (model_id, folder.name), folder

    def _others(self, model_id: str, in_use: Set[str]) -> Iterator[tuple[Model, Path]]:
        found = sorted((file.stat().st_mtime_ns, file) for file in self.root.glob(f"*/{_NAME}"))
        for _, file in found:
            name = file.read_text()
            if name != model_id and name not in in_use and not is_built_in(name):
                yield (name, ""), file.parent


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
