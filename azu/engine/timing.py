"""Measurements: tokens and waits of a pipeline's sequences, and the time of a frame between two stages."""

from collections.abc import Iterable
from dataclasses import dataclass

from azu import metrics
from azu.engine.pipeline import EnginePipeline
from azu.metrics import Meter
from azu.protocol.job import TokenEvent

STALL_S = 1.0
_RESULTS = ("repaired", "given_up")
# When a stage was idle for a shorter time before it took a frame, the frame may have waited for it.
_MIN_IDLE_S = 0.001


class PipelineMetrics:
    """The metrics of one pipeline: its tokens, the time between them, its sequences and its KV blocks."""

    def __init__(self, model_id: str, num_blocks: int, meter: Meter) -> None:
        self._model_id = model_id
        self._num_blocks = num_blocks
        self._meter = meter
        self._sequences: dict[int, _Sequence] = {}
        for counter in (metrics.PROMPT_TOKENS, metrics.GENERATED_TOKENS, metrics.STALLS):
            meter.count(counter, 0, model_id)
        for result in _RESULTS:
            meter.count(metrics.RECOVERIES, 0, model_id, result)

    def record_start(self, sequence_id: int, num_prompt: int, now_s: float) -> None:
        """Count a new sequence and its `num_prompt` prompt tokens."""
        self._sequences[sequence_id] = _Sequence(now_s)
        self._meter.count(metrics.PROMPT_TOKENS, num_prompt, self._model_id)

    def record_tokens(self, events: Iterable[tuple[int, TokenEvent]], now_s: float) -> None:
        """Count new tokens by sequence id; those of unknown sequences are ignored."""
        for sequence_id, event in events:
            sequence = self._sequences.get(sequence_id)
            if sequence is None:
                continue
            if event.token_ids:
                self._tokens(sequence, len(event.token_ids), now_s)
            if event.finish_reason is not None:
                del self._sequences[sequence_id]

    def record_recovery(self, *, given_up: bool = False) -> None:
        """Count a repair that replaced the lost pieces, or one that was given up."""
        self._meter.count(metrics.RECOVERIES, 1, self._model_id, _RESULTS[given_up])

    def set_load(self, pipeline: EnginePipeline) -> None:
        """Set the gauges of sequences and KV blocks to the pipeline's present state."""
        waiting, model_id = pipeline.num_waiting, self._model_id
        running = pipeline.num_sequences - waiting
        set_gauge = self._meter.set_gauge
        set_gauge(metrics.SEQUENCES, {(model_id, "running"): running, (model_id, "waiting"): waiting})
        set_gauge(metrics.KV_BLOCKS, {(model_id,): self._num_blocks})
        set_gauge(metrics.KV_BLOCKS_USED, {(model_id,): self._num_blocks - pipeline.num_free_blocks})

    def _tokens(self, sequence: "_Sequence", number: int, now_s: float) -> None:
        wait_s, model_id = now_s - sequence.last_s, self._model_id
        self._meter.count(metrics.GENERATED_TOKENS, number, model_id)
        if not sequence.has_token:
            self._meter.observe(metrics.TIME_TO_FIRST_TOKEN, wait_s, model_id)
        else:
            self._meter.observe(metrics.TIME_PER_TOKEN, wait_s / number, model_id)
            if wait_s >= STALL_S:
                self._meter.count(metrics.STALLS, 1, model_id)
        sequence.last_s, sequence.has_token = now_s, True


@dataclass(slots=True)
class _Sequence:
    last_s: float  # the time of its last token, or of its start before the first
    has_token: bool = False


@dataclass(frozen=True, slots=True)
class StageTiming:
    """How long a stage was idle before it took a frame, and how long it took to run it."""

    idle_s: float
    run_s: float


class StageClock:
    """Measures the frames of one stage, by that stage's clock."""

    def __init__(self) -> None:
        self._free_since_s = float("-inf")

    def record(self, taken_s: float, done_s: float) -> StageTiming:
        """Return the timing of a frame that the stage took and finished at these times."""
        idle_s = taken_s - self._free_since_s
        self._free_since_s = done_s
        return StageTiming(idle_s, done_s - taken_s)


def hop_s(answered_s: float, timing: StageTiming) -> float | None:
    """Return the network's part of the time from sending a frame to its acknowledgement: both ways.

    Return None when the frame may have waited for a busy stage.
    """
    return max(0.0, answered_s - timing.run_s) if timing.idle_s >= _MIN_IDLE_S else None
