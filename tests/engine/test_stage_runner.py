"""The log of sent rows, and a stage that checks every step before it runs it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from azu.engine.local import local_topology
from azu.engine.stage_contract import Handoff, StageSpec
from azu.engine.stage_runner import SentLog, StageRunner
from azu.errors import FrameError, ShardError
from azu.protocol.frame import Frame
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import OpenedSequence, Slice, StepBatch, StepResult
from azu.protocol.versions import Versions
from tests.engine.conftest import CutModel

_ROW = 4


def _slice(sequence_id: int, position: int, num_tokens: int) -> Slice:
    return Slice(sequence_id, position, num_tokens, (), sample=False)


def _payload(*rows: int) -> memoryview:
    return memoryview(b"".join(bytes([row]) * _ROW for row in rows))


def _log(max_rows: int = 100) -> SentLog:
    return SentLog(_ROW, max_rows * _ROW)


def test_rows_of_mixed_steps_are_returned_by_sequence_and_position() -> None:
    log = _log()
    log.record([_slice(1, 0, 2), _slice(2, 0, 1)], _payload(10, 11, 20))
    log.record([_slice(2, 1, 1), _slice(1, 2, 1)], _payload(21, 12))

    assert log.num_rows([1, 2, 3]) == {1: 3, 2: 2}
    assert log.rows([_slice(2, 0, 2), _slice(1, 1, 2)]) == bytes(_payload(20, 21, 11, 12))


def test_rows_that_are_computed_again_replace_the_old_ones() -> None:
    log = _log()
    log.record([_slice(1, 0, 4)], _payload(1, 2, 3, 4))
    log.record([_slice(1, 2, 3)], _payload(7, 8, 9))

    assert log.rows([_slice(1, 0, 5)]) == bytes(_payload(1, 2, 7, 8, 9))


def test_a_full_log_drops_the_sequence_that_began_first() -> None:
    log = _log(max_rows=5)
    log.record([_slice(1, 0, 3)], _payload(1, 2, 3))
    log.record([_slice(2, 0, 2)], _payload(1, 2))
    log.record([_slice(2, 2, 1)], _payload(3))

    assert log.num_rows([1, 2]) == {2: 3}
    assert log.rows([_slice(1, 0, 1)]) is None


def test_a_dropped_sequence_is_not_stored_from_its_middle_on() -> None:
    log = _log(max_rows=3)
    log.record([_slice(1, 0, 4)], _payload(1, 2, 3, 4))
    log.record([_slice(1, 4, 1)], _payload(5))
    assert log.num_rows([1]) == {}

    log.record([_slice(1, 0, 2)], _payload(1, 2))
    assert log.num_rows([1]) == {1: 2}


def test_a_finished_sequence_frees_its_space() -> None:
    log = _log(max_rows=4)
    log.record([_slice(1, 0, 2)], _payload(1, 2))
    log.drop([1, 99])
    log.record([_slice(2, 0, 4)], _payload(1, 2, 3, 4))

    assert log.num_rows([1, 2]) == {2: 4}


_STEPS = count(4)
_BATCH = StepBatch(
    epoch=1,
    step=4,
    micro_batch=0,
    slices=(
        Slice(1, 0, 3, (0,), sample=True, sequence_length=3),
        Slice(2, 0, 2, (2,), sample=False, sequence_length=9),
    ),
    token_ids=(5, 6, 7, 8, 9),
    opened=(OpenedSequence(1, SamplingParams(max_tokens=2, logprobs=3)),),
)


def _spec(model: CutModel, stage: int) -> StageSpec:
    topology = local_topology(model.structure, (0, 2, 6), num_blocks=4, block_size=4)
    return StageSpec(
        structure=model.structure,
        stage=topology.stages[stage],
        topology=topology,
        shard_paths=model.paths(),
        config_folder=model.shards,
        device="cpu",
    )


@pytest.fixture(scope="module")
def first(cut_model: Callable[[str], CutModel]) -> StageRunner:
    return StageRunner(_spec(cut_model("llama"), 0))


@pytest.fixture(scope="module")
def last(cut_model: Callable[[str], CutModel]) -> StageRunner:
    return StageRunner(_spec(cut_model("llama"), 1))


def _next(batch: StepBatch) -> StepBatch:
    """Return a batch with the number of a new step."""
    return replace(batch, step=next(_STEPS))


def _handoff(first: StageRunner) -> Handoff:
    output = first.run(_next(_BATCH), None)
    assert isinstance(output, Handoff)
    return output


def test_the_last_stage_samples_only_where_a_slice_asks_for_it(first: StageRunner, last: StageRunner) -> None:
    handoff = _handoff(first)
    result = last.run(handoff.batch, handoff.frame)

    assert isinstance(result, StepResult)
    assert [token.sequence_id for token in result.tokens] == [1]
    token = result.tokens[0]
    assert token.top_logprobs[0] == (token.token_id, token.logprob)
    assert len(token.top_logprobs) == 3


def test_a_handoff_has_no_token_ids(first: StageRunner) -> None:
    assert _handoff(first).batch.token_ids == ()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"epoch": 2}, "epoch"),
        ({"step": 1}, "step 1"),
        ({"micro_batch": 1}, "came with step"),
        ({"stage": 1}, "of stage 1"),
        ({"dtype": "int32"}, "int32"),
        ({"shape": (5, 64, 1)}, r"\[5, 64, 1\]"),
        ({"rows": ()}, "rows"),
    ],
)
def test_a_frame_of_another_step_or_shape_is_refused_and_its_sender_named(
    first: StageRunner, last: StageRunner, changes: dict[str, object], complaint: str
) -> None:
    handoff = _handoff(first)
    frame = replace(Frame.decode(handoff.frame), **changes).encode()

    with pytest.raises(FrameError, match=f"stage 0 sent .*{complaint}"):
        last.run(handoff.batch, frame)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(first: StageRunner, last: StageRunner, value: float) -> None:
    handoff = _handoff(first)
    frame = Frame.decode(handoff.frame)
    values = np.frombuffer(frame.payload, dtype=np.float32).copy()
    values[17] = value

    with pytest.raises(FrameError, match=r"stage 0 sent .*not finite"):
        last.run(handoff.batch, replace(frame, payload=values.tobytes()).encode())


def test_damaged_or_missing_bytes_are_refused(first: StageRunner, last: StageRunner) -> None:
    handoff = _handoff(first)
    damaged = bytearray(handoff.frame)
    damaged[-3] ^= 1

    with pytest.raises(FrameError, match="checksum"):
        last.run(handoff.batch, bytes(damaged))
    with pytest.raises(FrameError):
        last.run(handoff.batch, handoff.frame[:20])
    with pytest.raises(FrameError, match="without hidden states"):
        last.run(handoff.batch, None)


@pytest.mark.parametrize(
    "batch",
    [
        replace(_BATCH, epoch=0),
        replace(_BATCH, versions=Versions(10**6, 10**6, "9.0")),
        replace(_BATCH, token_ids=(5, 6, 7, 8)),
        replace(_BATCH, token_ids=(5, 6, 7, 8, 97)),
        replace(_BATCH, token_ids=(5, 6, 7, 8, -1)),
        replace(_BATCH, slices=(), token_ids=()),
        replace(_BATCH, slices=(Slice(1, 0, 5, (0,), sample=True),)),
        replace(_BATCH, slices=(Slice(1, 0, 5, (0, 4), sample=True),)),
        replace(_BATCH, slices=(Slice(1, 0, 5, (), sample=True),)),
    ],
)
def test_the_first_stage_refuses_steps_that_it_cannot_run(first: StageRunner, batch: StepBatch) -> None:
    with pytest.raises(FrameError):
        first.run(_next(batch), None)


def test_a_repeated_or_late_step_is_refused(first: StageRunner, last: StageRunner) -> None:
    earlier, later = _handoff(first), _handoff(first)
    last.run(later.batch, later.frame)

    for handoff in (later, earlier):
        with pytest.raises(FrameError, match=r"stage 0 sent .*came after step"):
            last.run(handoff.batch, handoff.frame)
        with pytest.raises(FrameError, match="came after step"):
            first.run(replace(_BATCH, step=handoff.batch.step), None)


def test_a_sequence_that_was_never_opened_is_not_sampled(first: StageRunner, last: StageRunner) -> None:
    handoff = _handoff(first)
    slices = (replace(_BATCH.slices[0], sample=False), replace(_BATCH.slices[1], sample=True))

    with pytest.raises(FrameError, match="sequence 2 was never opened"):
        last.run(replace(handoff.batch, slices=slices), handoff.frame)


def test_missing_or_wrong_shards_are_refused(cut_model: Callable[[str], CutModel]) -> None:
    model = cut_model("llama")
    spec, paths = _spec(model, 0), model.paths()

    with pytest.raises(ShardError, match="layer_1_dense"):
        StageRunner(replace(spec, shard_paths={k: v for k, v in paths.items() if k != "layer_1_dense"}))
    with pytest.raises(ShardError, match="layer_1_dense"):
        StageRunner(replace(spec, shard_paths={**paths, "layer_1_dense": paths["layer_2_dense"]}))
