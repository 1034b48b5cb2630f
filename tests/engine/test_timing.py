"""Measurements of the engine, with given times."""

import pytest

from azu import metrics
from azu.engine.pipeline import EnginePipeline
from azu.engine.scheduler import SchedulerConfig, Sequence
from azu.engine.timing import STALL_S, PipelineMetrics, StageClock, StageTiming, StepTimes, hop_s
from azu.metrics import Meter
from azu.protocol.job import FinishReason, TokenEvent
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import PieceProgress, PieceState
from tests.builders import structure, topology


class Piece:
    """A piece whose time a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.clock = StageClock(lambda: self.now_s)

    def ran(self, taken_s: float, done_s: float, *, layers: int = 1, waited_s: float = 0.0) -> StageTiming:
        self.now_s = taken_s
        self.clock.begin(1, 8)
        with self.clock.waiting():
            self.now_s += waited_s
        for _ in range(layers):
            self.clock.layer_done()
        self.now_s = done_s
        return self.clock.end()


def test_a_hop_excludes_the_time_of_the_stage() -> None:
    timing = Piece().ran(5.0, 5.2)

    assert hop_s(0.203, timing) == pytest.approx(0.003)


def test_a_frame_that_may_have_waited_for_the_stage_gives_no_hop() -> None:
    piece = Piece()
    piece.ran(5.0, 5.2)

    assert hop_s(0.4, piece.ran(5.2001, 5.4)) is None
    assert hop_s(0.203, piece.ran(6.0, 6.2)) == pytest.approx(0.003)


def test_a_piece_says_how_far_it_is_while_it_computes_and_that_it_waits() -> None:
    piece = Piece()
    clock = piece.clock
    assert clock.progress() == PieceProgress(0, 0, PieceState.IDLE)
    clock.begin(7, 8)
    clock.layer_done()
    assert clock.progress() == PieceProgress(7, 1, PieceState.BUSY)
    with clock.waiting():
        assert clock.progress().state is PieceState.WAITING
    clock.layer_done()
    piece.now_s = 0.5
    clock.end()
    assert clock.progress() == PieceProgress(7, 2, PieceState.IDLE)
    clock.begin(8, 8)
    assert clock.progress() == PieceProgress(8, 2, PieceState.BUSY, expected_s=0.5)


def test_a_step_is_expected_to_take_what_nine_of_ten_such_steps_took_lately() -> None:
    times = StepTimes()
    assert times.expected_s(1) is None
    for tenths in range(1, 21):
        times.record(5, tenths / 10)
    times.record(100, 30.0)

    assert times.expected_s(6) == 1.9
    assert times.expected_s(1) == 1.9, "narrower steps take hardly less time"
    assert times.expected_s(20) == 4 * 1.9, "wider ones may take as much more as they are wider"
    for _ in range(32):
        times.record(5, 0.2)
    assert times.expected_s(5) == 0.2


def test_a_slowdown_compares_recent_steps_with_the_quickest_of_their_width() -> None:
    times = StepTimes()
    for _ in range(7):
        times.record(5, 0.1)
        assert times.slowdown == 1.0
    times.record(5, 0.1)
    for _ in range(3):
        times.record(5, 9.0)
    assert times.slowdown == 1.0, "a few slow steps are none"
    for _ in range(8):
        times.record(5, 1.0)
    assert times.slowdown == pytest.approx(10.0)
    times.record(64, 3.0)
    assert times.slowdown == 1.0
    for milliseconds in (1, 9, 15):
        for _ in range(8):
            times.record(1, milliseconds / 1000)
        assert times.slowdown == 1.0, "so short steps vary by themselves"


def test_a_piece_is_not_slow_after_steps_that_only_sent_again_what_it_had_kept() -> None:
    piece = Piece()
    for step in range(8):
        piece.ran(step, step + 0.001, layers=0)
    for step in range(8, 16):
        piece.ran(step, step + 0.5)

    assert piece.clock.progress().slowdown == 1.0
    assert piece.clock.progress().expected_s == 0.5


def test_a_piece_is_not_slow_while_it_waits_for_another() -> None:
    piece = Piece()
    for step in range(8):
        piece.ran(step, step + 0.5)
    for step in range(8, 16):
        piece.ran(10 * step, 10 * step + 9.5, waited_s=9.0)

    assert piece.clock.progress().slowdown == 1.0


MODEL = "test/model"


def test_tokens_and_the_time_between_them_are_counted() -> None:
    meter = Meter()
    measured = PipelineMetrics(MODEL, 16, meter)
    measured.record_start(1, 30, 10.0)
    measured.record_tokens([(1, TokenEvent(0, (5,)))], 10.4)
    measured.record_tokens([(1, TokenEvent(0, (6, 7)))], 10.6)
    measured.record_tokens([(1, TokenEvent(0, (8,), finish_reason=FinishReason.STOP))], 10.7)
    measured.record_tokens([(1, TokenEvent(0, (9,))), (2, TokenEvent(0, (9,)))], 10.8)

    snapshot = meter.snapshot()

    assert snapshot.value(metrics.PROMPT_TOKENS, MODEL) == 30
    assert snapshot.value(metrics.GENERATED_TOKENS, MODEL) == 4
    first, between = (
        snapshot.histogram(metric, MODEL) for metric in (metrics.TIME_TO_FIRST_TOKEN, metrics.TIME_PER_TOKEN)
    )
    assert (first.count, round(first.sum, 6)) == (1, 0.4)
    assert (between.count, round(between.sum, 6)) == (2, 0.2)
    assert snapshot.values["azu_stalls_total", (MODEL,)] == 0
    assert snapshot.values["azu_disputed_choices_total", (MODEL,)] == 0


def test_a_long_wait_between_two_tokens_is_a_stall_and_a_long_wait_for_the_first_is_not() -> None:
    meter = Meter()
    measured = PipelineMetrics(MODEL, 16, meter)
    measured.record_start(1, 1, 0.0)
    for at_s in (STALL_S + 1, STALL_S + 1.5, 2 * STALL_S + 1.5):
        measured.record_tokens([(1, TokenEvent(0, (5,)))], at_s)

    assert meter.snapshot().value(metrics.STALLS, MODEL) == 1


def test_gauges_show_the_pipelines_sequences_and_blocks() -> None:
    engine = EnginePipeline(structure(4), topology({"a": (0, 4)}), SchedulerConfig(8, 16, max_running=1), ())
    meter = Meter()
    measured = PipelineMetrics(MODEL, 8, meter)
    for sequence_id in (1, 2):
        engine.add(Sequence(sequence_id, (1,) * 20, SamplingParams(max_tokens=4)))
    engine.next_batch()
    measured.set_load(engine)

    snapshot = meter.snapshot()

    assert snapshot.value(metrics.SEQUENCES, MODEL, "running") == 1
    assert snapshot.value(metrics.SEQUENCES, MODEL, "waiting") == 1
    assert snapshot.value(metrics.KV_BLOCKS, MODEL) == 8
    assert snapshot.value(metrics.KV_BLOCKS_USED, MODEL) == 2
