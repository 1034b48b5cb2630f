"""ExpertActor: experts of some layers on one node, apart from their routers."""

from collections.abc import Mapping
from pathlib import Path

from azu.engine.experts import ExpertRunner
from azu.protocol.structure import Structure


class ExpertActor:
    """Wraps an ExpertRunner. Stateless between calls: a lost slice is simply sent again."""

    def __init__(self) -> None:
        self._runner: ExpertRunner | None = None

    def load(
        self,
        structure: Structure,
        experts: Mapping[int, tuple[int, ...]],
        shard_paths: Mapping[str, Path],
        config_folder: Path,
        device: str,
    ) -> None:
        """Map the experts' shards."""
        self._runner = ExpertRunner(structure, experts, shard_paths, config_folder, device)

    def run(self, layer: int, request: bytes) -> bytes:
        """Run token slices through the experts of a layer."""
        assert self._runner is not None, "load() comes first"
        return self._runner.run(layer, request)
