"""ExpertActor: experts of some layers on one node, apart from their routers."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from actors.links import raises_known_errors
from actors.telemetry import log_as
from azu.engine.expert_counts import Received
from azu.engine.malloc import keep_between_steps
from azu.engine.timing import StageClock
from azu.models.slim import import_for_stages
from azu.protocol.step import PieceProgress
from azu.protocol.structure import Structure

if TYPE_CHECKING:
    from azu.engine.experts import ExpertRunner


@raises_known_errors
class ExpertActor:
    """Wraps an ExpertRunner. It keeps nothing that a lost slice needs: the slice is sent again."""

    def __init__(self) -> None:
        self._runner: ExpertRunner | None = None
        self._clock = StageClock()
        self._num_requests = 0

    def load(
        self,
        structure: Structure,
        experts: Mapping[int, tuple[int, ...]],
        shard_paths: Mapping[str, Path],
        config_folder: Path,
        device: str,
    ) -> None:
        """Map the experts' shards."""
        import_for_stages()
        from azu.engine.experts import ExpertRunner

        log_as("expert", model_id=structure.model_id)
        self._runner = ExpertRunner(structure, experts, shard_paths, config_folder, device)
        keep_between_steps()

    def run(self, layer: int, request: bytes) -> bytes:
        """Run token slices through the experts of a layer."""
        assert self._runner is not None, "load() comes first"
        self._num_requests += 1
        self._clock.begin(self._num_requests, len(request))
        try:
            answer = self._runner.run(layer, request)
            self._clock.layer_done()
        finally:
            self._clock.end()
        return answer

    def received(self, epoch: int, steps: Sequence[int]) -> Received | None:
        """Return how many choices came in some steps by layer, None when that is forgotten."""
        assert self._runner is not None, "load() comes first"
        return self._runner.received.of(epoch, steps)

    def ping(self, seconds: float) -> PieceProgress:
        """Return after some seconds how far this set is; the call fails at once when this process dies."""
        threading.Event().wait(seconds)
        return self._clock.progress()
