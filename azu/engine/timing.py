"""Measurements: a pipeline's tokens and waits, a piece's steps, and a frame's time between two stages."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from azu import metrics
from azu.engine.expert_counts import Difference
from azu.engine.pipeline import EnginePipeline
from azu.metrics import Meter
from azu.protocol.job import TokenEvent
from azu.protocol.step import PieceProgress, PieceState

STALL_S = 1.0
_KEPT_STEPS = 64
_RESULTS = ("repaired", "given_up")
# When a stage was idle for a shorter time before it took a frame, the frame may have waited for it.
_MIN_IDLE_S = 0.001
# The steps from which a time is expected, and those whose median is what a step typically takes now.
_RECENT_STEPS = 32
_TYPICAL_STEPS = 8
# How much longer a shorter step takes says more of other processes than of the piece.
_NOISE_S = 0.02


class PipelineMetrics:
    """The metrics of one pipeline: its tokens, the time between them, its sequences and its KV blocks."""

    def __init__(self, model_id: str, num_blocks: int, meter: Meter) -> None:
        self._model_id = model_id
        self._num_blocks = num_blocks
        self._meter = meter
        self._sequences: dict[int, _Sequence] = {}
        tokens = (metrics.PROMPT_TOKENS, metrics.GENERATED_TOKENS)
        for counter in (*tokens, metrics.STALLS, metrics.DISPUTED_CHOICES):
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

    def record_difference(self, found: Difference) -> None:
        """Count the choices that a router and an expert set count differently."""
        self._meter.count(metrics.DISPUTED_CHOICES, abs(found.said - found.got), self._model_id)

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


class RoundTimes:
    """How long the last steps of a pipeline took, from their sending until their tokens were back."""

    def __init__(self) -> None:
        self._sent_s: dict[int, float] = {}
        self._took_s: deque[float] = deque(maxlen=_KEPT_STEPS)

    def sent(self, step: int, now_s: float) -> None:
        """Note that a step leaves."""
        self._sent_s[step] = now_s

    def returned(self, step: int, now_s: float) -> None:
        """Note that a step is back; those before it were dropped, if they are not back."""
        if step in self._sent_s:
            self._took_s.append(now_s - self._sent_s[step])
            self._sent_s = {later: sent_s for later, sent_s in self._sent_s.items() if later > step}

    @property
    def usual_s(self) -> float:
        """The median of the last steps, 0 before the first."""
        return median(self._took_s) if self._took_s else 0.0


@dataclass(frozen=True, slots=True)
class StageTiming:
    """How long a stage was idle before it took a frame, and how long it took to run it."""

    idle_s: float
    run_s: float


class StepTimes:
    """The times of a piece's recent steps by their width: the number of tokens, to the next power of two."""

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = {}  # by bits of the width
        self._quickest_s: dict[int, float] = {}  # the least median of so many steps that there was
        self._last = 0

    def record(self, num_tokens: int, seconds: float) -> None:
        """Take the time of a step."""
        self._last = bits = num_tokens.bit_length()
        self._recent.setdefault(bits, deque(maxlen=_RECENT_STEPS)).append(seconds)
        if (typical_s := self._typical_s(bits)) is not None:
            self._quickest_s[bits] = min(typical_s, self._quickest_s.get(bits, typical_s))

    def expected_s(self, num_tokens: int) -> float | None:
        """Return the time that nine of ten such steps stay below, None before the first step of any width."""
        bits = num_tokens.bit_length()
        if not self._recent:
            return None
        nearest = min(self._recent, key=lambda one: abs(one - bits))
        times = sorted(self._recent[nearest])
        # A narrower step takes hardly less time, a wider one up to twice as much for twice the tokens.
        return times[(9 * len(times)) // 10] * 2.0 ** max(0, bits - nearest)

    @property
    def slowdown(self) -> float:
        """How many times as long as the quickest ones recent steps take; 1 until there are enough of them."""
        typical_s = self._typical_s(self._last)
        if typical_s is None:
            return 1.0
        return max(typical_s, _NOISE_S) / max(self._quickest_s[self._last], _NOISE_S)

    def _typical_s(self, bits: int) -> float | None:
        times = list(self._recent.get(bits, ()))[-_TYPICAL_STEPS:]
        return median(times) if len(times) == _TYPICAL_STEPS else None


class StageClock:
    """Measures the steps of one piece, by a clock in seconds; other threads may ask how far it is.

    What a piece waits for another one, and a step without a layer, such as one that sends kept rows again,
    says nothing of how fast the piece computes.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._free_since_s = float("-inf")
        self._taken_s = 0.0
        self._waited_s = 0.0
        self._num_layers_before = 0
        self._times = StepTimes()
        self._num_tokens = 0
        self._step = 0
        self._num_layers = 0
        self._state = PieceState.IDLE
        self._expected_s: float | None = None
        self._slowdown = 1.0

    def begin(self, step: int, num_tokens: int) -> None:
        """Take a step."""
        self._taken_s, self._waited_s = self._clock(), 0.0
        self._num_tokens, self._step, self._num_layers_before = num_tokens, step, self._num_layers
        self._expected_s = self._times.expected_s(num_tokens)
        self._state = PieceState.BUSY

    def layer_done(self) -> None:
        """Count a layer."""
        self._num_layers += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for another piece within a step."""
        self._state, began_s = PieceState.WAITING, self._clock()
        try:
            yield
        finally:
            self._waited_s += self._clock() - began_s
            self._state = PieceState.BUSY

    def end(self) -> StageTiming:
        """Return the timing of the step."""
        self._state, now_s = PieceState.IDLE, self._clock()
        timing = StageTiming(self._taken_s - self._free_since_s, now_s - self._taken_s)
        if self._num_layers > self._num_layers_before:
            self._times.record(self._num_tokens, timing.run_s - self._waited_s)
        self._free_since_s = now_s
        self._slowdown = self._times.slowdown
        return timing

    def progress(self) -> PieceProgress:
        """Return how far the piece is."""
        return PieceProgress(self._step, self._num_layers, self._state, self._expected_s, self._slowdown)


def hop_s(answered_s: float, timing: object) -> float | None:
    """Return the network's part of the time from sending a frame to its acknowledgement: both ways.

    Return None when the frame may have waited for a busy stage, and for an answer that is no StageTiming.
    """
    if not isinstance(timing, StageTiming) or not type(timing.idle_s) is type(timing.run_s) is float:
        return None
    is_clear = timing.idle_s >= _MIN_IDLE_S and 0 <= timing.run_s < math.inf
    return max(0.0, answered_s - timing.run_s) if is_clear else None
