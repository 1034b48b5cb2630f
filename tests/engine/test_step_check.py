"""An answer is checked against its step: whatever else a stage says is refused, and the sender is named."""

from contextlib import suppress
from dataclasses import replace
from math import inf, isfinite, nan
from typing import Any

import pytest
from hypothesis import given

from azu.cluster.liveness import PieceWatch, Pulse
from azu.engine.scheduler import Sequence
from azu.engine.stage_contract import BadFrame
from azu.engine.step_check import StepCheck, check_chosen, check_counts, check_progress
from azu.engine.timing import StageTiming, hop_s
from azu.errors import FrameError
from azu.planner.replicas import expert_heat
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import (
    ExpertWork,
    PieceProgress,
    PieceState,
    Replay,
    SampledToken,
    SequenceFault,
    Slice,
    StepBatch,
    StepResult,
)
from azu.protocol.topology import ExpertSet, LayerSpan, Stage
from tests import builders

# Layer 1 of the first stage and layer 3 of the second have experts elsewhere; layer 2 has all of them.
STRUCTURE = builders.structure(4, moe_layers={1: 4, 2: 4, 3: 4})
TOPOLOGY = replace(
    builders.topology({"a": (0, 2), "b": (2, 4)}),
    stages=(
        Stage(0, "a", LayerSpan(0, 2), {1: (0,)}, 0),
        Stage(1, "b", LayerSpan(2, 4), {2: (0, 1, 2, 3), 3: ()}, 0),
    ),
    expert_sets=(ExpertSet(0, "c", {1: (1, 2, 3), 3: (0, 1)}, 0), ExpertSet(1, "d", {3: (2, 3)}, 0)),
)
CHECK = StepCheck(STRUCTURE, TOPOLOGY)
# Three tokens of a prompt that go on later, two that are sampled after, one more with log probabilities.
CHOSEN = tuple(
    (
        Sequence(key, (5,) * num_tokens, SamplingParams(4, logprobs=logprobs)),
        Slice(key, 0, num_tokens, (), sample),
    )
    for key, num_tokens, sample, logprobs in ((1, 3, False, None), (2, 2, True, None), (3, 1, True, 2))
)
TOKENS = (SampledToken(2, 9), SampledToken(3, 0, -0.5, ((0, -0.5), (255, -3.0))))
WORK = (
    ExpertWork(1, None, {1: 1, 3: 1}),
    ExpertWork(1, 0, {1: 5, 2: 4, 3: 1}),
    ExpertWork(3, 0, {1: 6, 2: 1}),
    ExpertWork(3, 1, {2: 3, 3: 2}),
)
RIGHT = StepResult(1, 7, 0, TOKENS, expert_work=WORK)
FAULT = SequenceFault(1, "numerics_error", "it is not finite", "c", 3)
FAILED = tuple(replace(FAULT, sequence_id=key) for key in (1, 2, 3))


def check(result: StepResult, replay: Replay | None = None) -> None:
    CHECK.check_result(result, 0, CHOSEN, replay)


def work(*changed: ExpertWork, without: int = 0) -> dict[str, object]:
    return {"expert_work": (*WORK[without:], *changed)}


def token(**changed: object) -> dict[str, object]:
    return {"tokens": (TOKENS[0], replace(TOKENS[1], **changed))}  # type: ignore[arg-type]


RIGHTS: dict[str, dict[str, object]] = {
    "as it is": {},
    "in parts": {"most_tokens": 2},
    "parts of work": {"expert_work": (*WORK[:3], ExpertWork(3, 1, {2: 1}), ExpertWork(3, 1, {2: 2, 3: 2}))},
    "a fault": {"faults": (FAULT,)},
    "a fault of no node": {"faults": (replace(FAULT, node_id=None, layer=99),)},
    "a fault before it samples": {
        "faults": (replace(FAULT, sequence_id=2),),
        "tokens": TOKENS[1:],
        "expert_work": (ExpertWork(1, 0, {1: 6, 3: 2}), ExpertWork(3, 0, {1: 6, 3: 2})),
    },
    "all failed in the first stage": {"faults": FAILED, "tokens": (), "expert_work": (), "stopped_at": 0},
}
WRONGS: dict[str, dict[str, object]] = {
    "no token": {"tokens": TOKENS[:1]},
    "two tokens": {"tokens": (*TOKENS, SampledToken(2, 9))},
    "a token of a slice that does not sample": {"tokens": (*TOKENS, SampledToken(1, 9))},
    "a token of an unknown sequence": {"tokens": (*TOKENS, SampledToken(99, 9))},
    "a token of a sequence that failed": {"faults": (replace(FAULT, sequence_id=2),)},
    "a token outside the vocabulary": {"tokens": (SampledToken(2, 256), TOKENS[1])},
    "a token below the vocabulary": {"tokens": (SampledToken(2, -1), TOKENS[1])},
    "a token that is a truth value": {"tokens": (SampledToken(2, True), TOKENS[1])},
    "a token that is a float": {"tokens": (SampledToken(2, 9.0), TOKENS[1])},  # type: ignore[arg-type]
    "log probabilities that were not asked for": {"tokens": (SampledToken(2, 9, -1.0), TOKENS[1])},
    "no log probability": token(logprob=None),
    "a NaN log probability": token(logprob=nan),
    "an infinite log probability": token(logprob=-inf),
    "a log probability that is a number in words": token(logprob="-0.5"),
    "too few other tokens": token(top_logprobs=((0, -0.5),)),
    "too many other tokens": token(top_logprobs=((0, -0.5), (1, -1.0), (2, -2.0))),
    "one other token twice": token(top_logprobs=((0, -0.5), (0, -0.6))),
    "a NaN among the others": token(top_logprobs=((0, -0.5), (1, nan))),
    "another token outside the vocabulary": token(top_logprobs=((0, -0.5), (256, -1.0))),
    "a fault of an unknown sequence": {"faults": (replace(FAULT, sequence_id=99),)},
    "a fault twice": {"faults": (FAULT, FAULT)},
    "a fault of an unknown node": {"faults": (replace(FAULT, node_id="z"),)},
    "a fault of a node in a layer that it does not hold": {"faults": (replace(FAULT, layer=0),)},
    "a fault in no layer": {"faults": (replace(FAULT, layer=4),)},
    "a fault in a layer before all": {"faults": (replace(FAULT, layer=-1),)},
    "a fault whose code is a text": {"faults": (replace(FAULT, code="pay 0xabc or"),)},
    "a fault without a message": {"faults": (replace(FAULT, message=None),)},  # type: ignore[arg-type]
    "stopped although sequences went on": {"stopped_at": 0},
    "stopped in no stage": {"faults": FAILED, "tokens": (), "expert_work": (), "stopped_at": 2},
    "parts of no token": {"most_tokens": 0},
    "parts of more than the step": {"most_tokens": 7},
    "another micro-batch": {"micro_batch": 1},
    "work of an unknown set": work(ExpertWork(1, 2, {1: 1})),
    "work of a set in a layer that it does not hold": work(ExpertWork(1, 1, {1: 1})),
    "work of a router without experts": work(ExpertWork(3, None, {1: 1})),
    "work in a layer with all experts beside the router": work(ExpertWork(2, None, {1: 1})),
    "work in a dense layer": work(ExpertWork(0, None, {1: 1})),
    "work in no layer": work(ExpertWork(4, 0, {1: 1})),
    "work of an unknown sequence": work(ExpertWork(1, 0, {99: 1})),
    "more work than choices": work(ExpertWork(1, 0, {2: 1})),
    "less work than choices": work(ExpertWork(1, None, {1: 1}), without=1),
    "no work": {"expert_work": ()},
    "more of one expert than there are tokens": {
        "expert_work": (ExpertWork(1, None, {1: 4, 3: 1}), ExpertWork(1, 0, {1: 2, 2: 4, 3: 1}), *WORK[2:])
    },
    "the same in two parts": {
        "expert_work": (*(ExpertWork(1, None, {1: 2}),) * 2, ExpertWork(1, 0, {1: 2, 2: 4, 3: 2}), *WORK[2:])
    },
    "no choices": work(ExpertWork(1, 0, {1: 0})),
    "less than no choices": work(ExpertWork(1, 0, {1: -1}), ExpertWork(1, None, {1: 1})),
    "choices that are a truth value": {"expert_work": (ExpertWork(1, None, {1: True, 3: 1}), *WORK[1:])},
    "choices that are a float": {"expert_work": (ExpertWork(1, None, {1: 1.0, 3: 1}), *WORK[1:])},
    "a layer that is a float": {"expert_work": (ExpertWork(1.0, None, {1: 1, 3: 1}), *WORK[1:])},  # type: ignore[arg-type]
    "tokens that are none": {"tokens": None},
    "tokens that are numbers": {"tokens": (9, 9)},
    "faults that are texts": {"faults": ("all",)},
    "work that is a number": {"expert_work": 5},
    "choices that are a list": {"expert_work": (ExpertWork(1, None, [1]), *WORK[1:])},  # type: ignore[arg-type]
    "a stage that is a text": {"stopped_at": "0"},
}


@pytest.mark.parametrize("changed", RIGHTS.values(), ids=RIGHTS)
def test_what_honest_stages_answer_is_accepted(changed: dict[str, object]) -> None:
    check(replace(RIGHT, **changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("changed", WRONGS.values(), ids=WRONGS)
def test_anything_else_is_a_bad_frame_of_the_last_stage(changed: dict[str, object]) -> None:
    wrong = replace(RIGHT, **changed)  # type: ignore[arg-type]

    with pytest.raises(BadFrame) as refused:
        check(wrong)
    assert refused.value.sender == (0 if wrong.stopped_at == 0 else 1)


def test_a_replay_samples_nothing_and_runs_only_its_own_layers() -> None:
    replayed = tuple((one, replace(slice_, sample=False)) for one, slice_ in CHOSEN)
    own = replace(RIGHT, tokens=(), expert_work=WORK[:2])
    CHECK.check_result(own, 0, replayed, Replay(0, 0))

    for wrong in (replace(own, tokens=TOKENS), replace(own, expert_work=WORK)):
        with pytest.raises(BadFrame) as refused:
            CHECK.check_result(wrong, 0, replayed, Replay(0, 0))
        assert refused.value.sender == 0


BATCH = StepBatch(1, 7, 0, tuple(slice_ for _, slice_ in CHOSEN), expert_work=WORK[:2])
EARLY = replace(FAULT, sequence_id=8, layer=1)


def test_a_stage_takes_what_honest_stages_relay() -> None:
    CHECK.check_relayed(BATCH, 1)
    CHECK.check_relayed(replace(BATCH, faults=(EARLY,), most_tokens=5), 1)
    CHECK.check_relayed(replace(BATCH, expert_work=(), replay=Replay(1, 1)), 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"expert_work": WORK},  # of layers that come later
        {"expert_work": ()},
        {"expert_work": (*WORK[:2], ExpertWork(1, 0, {1: 1}))},
        {"expert_work": (*WORK[:2], ExpertWork(1, 0, {8: 1}))},
        {"slices": BATCH.slices[:2]},
        {"slices": (*BATCH.slices, BATCH.slices[0])},
        {"faults": (replace(EARLY, sequence_id=1),)},
        {"faults": (replace(EARLY, node_id="b"),)},
        {"faults": (replace(EARLY, layer=2, node_id="b"),)},
        {"most_tokens": 0},
        {"expert_work": None},
    ],
)
def test_a_stage_refuses_what_no_honest_stage_relays(changed: dict[str, object]) -> None:
    with pytest.raises(FrameError):
        CHECK.check_relayed(replace(BATCH, **changed), 1)  # type: ignore[arg-type]


@given(one=builders.RUBBISH, two=builders.RUBBISH)
def test_what_a_piece_says_of_itself_is_refused_or_can_be_reckoned_with(one: Any, two: Any) -> None:
    for told in (
        one,
        PieceProgress(one, two, PieceState.IDLE),
        PieceProgress(1, 2, PieceState.BUSY, one, two),
    ):
        with suppress(FrameError):
            check_progress(told)
            watch = PieceWatch(0.0)
            watch.answered(told, 1.0)
            assert watch.judge(2.0) in Pulse
            assert isfinite(watch.slowdown)
    for told in (one, {one: two} if isinstance(one, int) else two):
        with suppress(FrameError):
            assert sum(check_counts(told).values()) >= 0
        with suppress(FrameError):
            chosen = check_chosen(told)
            assert expert_heat(chosen, dict.fromkeys(chosen, (1,)), least_choices=1) is not None
    for told in (one, StageTiming(one, two), StageTiming(1.0, one)):
        hop = hop_s(1.0, told)
        assert hop is None or isfinite(hop)


def test_what_an_honest_piece_says_of_itself_is_taken() -> None:
    for progress in (
        PieceProgress(0, 0, PieceState.IDLE),
        PieceProgress(1, 2, PieceState.BUSY, expected_s=0.5, slowdown=2.0),
    ):
        assert check_progress(progress) is progress
    assert check_counts({1: 5}) == {1: 5}
    assert check_chosen({0: [1, 2]}) == {0: (1, 2)}
    assert hop_s(1.0, StageTiming(inf, 0.25)) == 0.75
