"""LayerActor: one stage of a model on one node."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ray.actor import ActorHandle

from actors.link import Acknowledgements, RayExpertLink
from azu.engine.spec import Handoff, StageSpec
from azu.errors import AzuError
from azu.protocol.step import StepBatch

if TYPE_CHECKING:
    from azu.engine.runner import StageRunner


class LayerActor:
    """Wraps a StageRunner and hands each step to the next stage itself."""

    def __init__(self) -> None:
        self._runner: StageRunner | None = None

    def load(
        self,
        spec: StageSpec,
        expert_sets: Mapping[int, ActorHandle],
        next_stage: ActorHandle | None,
        pipeline: ActorHandle,
        ack_timeout_s: float,
    ) -> None:
        """Map the stage's shards and learn where its hidden states go."""
        # torch is imported here: whoever only places this actor does without it.
        from azu.engine.runner import StageRunner

        self._runner = StageRunner(spec, RayExpertLink(expert_sets) if expert_sets else None)
        self._index = spec.stage.index
        self._next = next_stage
        self._pipeline = pipeline
        self._acks = Acknowledgements(
            f"stage {self._index + 1}", ack_timeout_s, lambda error: self._report(self._index + 1, error)
        )

    def step(self, batch: StepBatch, frame: bytes | None) -> None:
        """Run one step and pass it on; whoever called takes the return as acknowledgement."""
        assert self._runner is not None, "load() comes first"
        try:
            output = self._runner.run(batch, frame)
        except AzuError as error:
            self._report(self._index, error)
            return
        if isinstance(output, Handoff):
            assert self._next is not None
            self._acks.expect(self._next.step.remote(output.batch, output.frame))
        else:
            self._pipeline.completed.remote(output)

    def _report(self, stage: int, error: AzuError) -> None:
        self._pipeline.lost.remote(stage, error)
