"""How fast the sequences of one deployment go, as seen where their tokens come out."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from azu import metrics
from azu.engine.pipeline import SequenceUpdate
from azu.metrics import Meter

STALL_S = 1.0
_RESULTS = ("repaired", "given_up")


class Load(Protocol):
    """What a pipeline has to do, in sequences and KV blocks."""

    @property
    def num_sequences(self) -> int:
        """Sequences that have not finished."""

    @property
    def num_waiting(self) -> int:
        """Those of them that hold no blocks yet, or no longer."""

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that no sequence holds."""


@dataclass(slots=True)
class _Sequence:
    """When the last token came, or the sequence while there was none."""

    last_s: float
    has_token: bool = False


class PipelineMetrics:
    """Counts tokens and the time between them into a meter."""

    def __init__(self, model_id: str, num_blocks: int, meter: Meter) -> None:
        self._model_id = model_id
        self._num_blocks = num_blocks
        self._meter = meter
        self._sequences: dict[int, _Sequence] = {}
        for counter in (metrics.PROMPT_TOKENS, metrics.GENERATED_TOKENS, metrics.STALLS):
            meter.count(counter, 0, model_id)
        for result in _RESULTS:
            meter.count(metrics.RECOVERIES, 0, model_id, result)

    def began(self, sequence_id: int, num_prompt: int, now_s: float) -> None:
        """Count a new sequence."""
        self._sequences[sequence_id] = _Sequence(now_s)
        self._meter.count(metrics.PROMPT_TOKENS, num_prompt, self._model_id)

    def went_on(self, updates: Iterable[SequenceUpdate], now_s: float) -> None:
        """Count what is new of sequences."""
        for update in updates:
            sequence = self._sequences.get(update.sequence_id)
            if sequence is None:
                continue
            if update.token_ids:
                self._tokens(sequence, len(update.token_ids), now_s)
            if update.finish_reason is not None:
                del self._sequences[update.sequence_id]

    def repaired(self, *, given_up: bool = False) -> None:
        """Count that lost pieces came up elsewhere, or that none of them could."""
        self._meter.count(metrics.RECOVERIES, 1, self._model_id, _RESULTS[given_up])

    def stand(self, load: Load) -> None:
        """Show what the pipeline has to do now."""
        waiting, model_id = load.num_waiting, self._model_id
        running = load.num_sequences - waiting
        show = self._meter.set_gauge
        show(metrics.SEQUENCES, {(model_id, "running"): running, (model_id, "waiting"): waiting})
        show(metrics.KV_BLOCKS, {(model_id,): self._num_blocks})
        show(metrics.KV_BLOCKS_USED, {(model_id,): self._num_blocks - load.num_free_blocks})

    def _tokens(self, sequence: _Sequence, number: int, now_s: float) -> None:
        wait_s, model_id = now_s - sequence.last_s, self._model_id
        self._meter.count(metrics.GENERATED_TOKENS, number, model_id)
        if not sequence.has_token:
            self._meter.observe(metrics.TIME_TO_FIRST_TOKEN, wait_s, model_id)
        else:
            self._meter.observe(metrics.TIME_PER_TOKEN, wait_s / number, model_id)
            if wait_s >= STALL_S:
                self._meter.count(metrics.STALLS, 1, model_id)
        sequence.last_s, sequence.has_token = now_s, True


# A stage that came free so shortly before it took a frame may have kept it waiting.
_IDLE_S = 0.001


@dataclass(frozen=True, slots=True)
class StageTiming:
    """How long a stage had had nothing to do when it took a frame, and how long it then kept the frame."""

    idle_s: float
    kept_s: float


class StageClock:
    """A stage's own clock."""

    def __init__(self) -> None:
        self._free_since_s = float("-inf")

    def stay(self, taken_s: float, done_s: float) -> StageTiming:
        """Return the stay of a frame that was taken and done at those times."""
        idle_s = taken_s - self._free_since_s
        self._free_since_s = done_s
        return StageTiming(idle_s, done_s - taken_s)


def hop_s(answered_s: float, stay: StageTiming) -> float | None:
    """Return the time on the way there and back of a frame that was answered after so long.

    None where the frame may have waited for a stage that was busy: that is no hop.
    """
    return max(0.0, answered_s - stay.kept_s) if stay.idle_s >= _IDLE_S else None
