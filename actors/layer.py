"""LayerActor: one stage of a model on one node."""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ray.actor import ActorHandle

from actors.links import Acknowledgements, RayExpertLink, get, raises_known_errors
from actors.telemetry import log_as, open_supervisor
from azu.engine.malloc import keep_between_steps
from azu.engine.stage_contract import Handoff, OldEpoch, StageSpec, blamed, is_bad_frame
from azu.engine.timing import StageClock, StageTiming, hop_s
from azu.errors import AzuError, InternalError
from azu.metrics import HOP
from azu.models.slim import import_for_stages
from azu.protocol.step import PieceProgress, SeenTokens, StepBatch
from azu.protocol.topology import PieceSet, Topology

if TYPE_CHECKING:
    from azu.engine.stage_runner import StageRunner


log = logging.getLogger(__name__)

_MOST_REPORTS = 3


@raises_known_errors
class LayerActor:
    """Wraps a StageRunner and hands each step to the next stage itself."""

    def __init__(self) -> None:
        self._runner: StageRunner | None = None
        self._clock = StageClock()

    def load(
        self,
        spec: StageSpec,
        expert_sets: Mapping[int, ActorHandle],
        next_stage: ActorHandle | None,
        pipeline: ActorHandle,
        ack_timeout_s: float,
    ) -> None:
        """Map the stage's shards and learn where its hidden states go."""
        # torch is imported here: a process that only places this actor does without it.
        import_for_stages()
        from azu.engine.stage_runner import StageRunner

        log_as("layer", model_id=spec.structure.model_id, stage=spec.stage.index)
        self._runner = StageRunner(spec, self._expert_link(expert_sets))
        self._runner.watch_layers(self._clock.layer_done)
        keep_between_steps()
        self._index = spec.stage.index
        self._model_id = spec.structure.model_id
        self._supervisor = open_supervisor("layer")
        self._pipeline = pipeline
        self._ack_timeout_s = ack_timeout_s
        self._next = next_stage
        self._acks = self._expect_from(self._index + 1, spec.topology.epoch)

    def relink(
        self,
        topology: Topology,
        expert_sets: Mapping[int, ActorHandle],
        next_stage: ActorHandle | None,
        pipeline: ActorHandle,
    ) -> None:
        """Go on under a newer topology with other neighbours; steps of an older one are dropped."""
        assert self._runner is not None, "load() comes first"
        self._runner.relink(topology, self._expert_link(expert_sets))
        if pipeline != self._pipeline:
            # Another pipeline numbers its sequences anew and has none of the old ones.
            self._runner.forget_sequences()
            self._pipeline = pipeline
        self._acks.close()
        self._next = next_stage
        self._acks = self._expect_from(self._index + 1, topology.epoch)

    def see(self, sequences: Sequence[SeenTokens]) -> None:
        """Store what this last stage's penalties look at; the steps that need it come after the answer."""
        assert self._runner is not None, "load() comes first"
        self._runner.see(sequences)

    def num_sent(self, sequence_ids: Sequence[int]) -> Mapping[int, int]:
        """Return how many rows of which sequences can be sent to the next stage again."""
        assert self._runner is not None, "load() comes first"
        return self._runner.num_sent(sequence_ids)

    def num_chosen(self) -> Mapping[int, Sequence[int]]:
        """Return how often each expert was chosen, for the layers that have experts elsewhere."""
        assert self._runner is not None, "load() comes first"
        return self._runner.num_chosen()

    def ping(self, seconds: float) -> PieceProgress:
        """Return after some seconds how far this stage is; the call fails at once when this process dies."""
        threading.Event().wait(seconds)
        return self._clock.progress()

    def step(self, batch: StepBatch, frame: bytes | None) -> StageTiming:
        """Run one step and pass it on; the caller takes the return as acknowledgement."""
        self._clock.begin(batch.step, batch.num_tokens)
        try:
            self._run(batch, frame)
        finally:
            timing = self._clock.end()
        return timing

    def _run(self, batch: StepBatch, frame: bytes | None) -> None:
        assert self._runner is not None, "load() comes first"
        for sequence in batch.opened:
            log.info("opened", extra={"sequence_id": sequence.sequence_id, "epoch": batch.epoch})
        try:
            output = self._runner.run(batch, frame)
        except OldEpoch as error:
            log.info("%s", error.message)
            return
        except AzuError as error:
            self._report(blamed(error, self._index), error, batch.epoch)
            return
        if isinstance(output, Handoff):
            assert self._next is not None
            self._acks.expect(self._next.step.remote(output.batch, output.frame))
        else:
            self._acks.expect(self._pipeline.completed.remote(output))

    def _expert_link(self, expert_sets: Mapping[int, ActorHandle]) -> RayExpertLink | None:
        return RayExpertLink(expert_sets, self._clock.waiting) if expert_sets else None

    def _expect_from(self, stage: int, epoch: int) -> Acknowledgements:
        # Behind the last stage stands the pipeline: it takes a step again that it failed to take.
        loss = PieceSet(stages=frozenset({stage} if self._next else ()))
        return Acknowledgements(
            f"stage {stage}" if self._next else "the pipeline",
            self._next,
            self._ack_timeout_s,
            lost=lambda error: self._report(loss, error, epoch),
            answered=self._answered,
            supervisor=self._supervisor,
        )

    def _answered(self, seconds: float, stay: object) -> None:
        if (hop := hop_s(seconds, stay)) is not None:
            self._supervisor.meter.observe(HOP, hop, self._model_id, str(self._index))

    def _report(self, loss: PieceSet, error: AzuError, epoch: int) -> None:
        log.warning("%s is to blame: %s", loss, error.message)
        for _ in range(_MOST_REPORTS):
            sent = self._pipeline.lost.remote(loss, error.message, epoch, is_bad_frame(error))
            try:
                get(sent, self._ack_timeout_s, "the pipeline")
            except InternalError as refused:
                log.warning("the report is sent again: %s", refused.message)
            except AzuError as gone:
                log.warning("%s", gone.message)  # its successor begins with steps of its own
                return
            else:
                return
