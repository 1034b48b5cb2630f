"""Cut models that many tests share, because cutting one takes longer than running it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from azu.models import describe
from azu.models.cut import cut
from azu.protocol.structure import Structure
from tests.engine.families import save_model


@dataclass(frozen=True, slots=True)
class CutModel:
    """A tiny model's folder, and its shards."""

    source: Path
    shards: Path
    structure: Structure

    def paths(self) -> dict[str, Path]:
        """Every shard's file."""
        return {shard.name: self.shards / shard.file_name for shard in self.structure.shards}


@pytest.fixture(scope="session")
def cut_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CutModel]:
    """Return a function from a family's name to its cut model."""
    done: dict[str, CutModel] = {}

    def get(family: str) -> CutModel:
        if family not in done:
            folder = tmp_path_factory.mktemp(family)
            source, shards = save_model(family, folder / "model"), folder / "shards"
            structure = cut(source, shards, model_id=family, revision="r1", architecture=describe(source))
            done[family] = CutModel(source, shards, structure)
        return done[family]

    return get
