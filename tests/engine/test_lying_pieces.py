"""Stages and expert sets that lie about a step: the liar is named, no answer changes, nothing is gained."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import nan

import pytest

from azu.engine.accounting import Work
from azu.engine.expert_counts import Received, check_received
from azu.engine.local import LocalPipeline, local_topology
from azu.engine.stage_contract import BadFrame, Handoff, blamed
from azu.errors import FrameError
from azu.protocol.job import PLATFORM_NODE
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import ExpertWork, SampledToken, SequenceFault, StepBatch, StepResult
from azu.protocol.topology import ExpertSet
from tests.engine.conftest import CutModel
from tests.engine.test_replay import _Deployment, _prompts
from tests.few import few

FAMILY = "mixtral"
BOUNDARIES = (0, 3, 6)
PROMPTS = _prompts(5, 11, 1)
SAMPLING = [SamplingParams(max_tokens=4, ignore_eos=True, logprobs=2)] * 3
HONEST_STEPS = 3


def last(result: StepResult, **changed: object) -> StepResult:
    """Return a result whose last token is another."""
    *others, token = result.tokens
    return replace(result, tokens=(*others, replace(token, **changed)))  # type: ignore[arg-type]


def more(work: tuple[ExpertWork, ...], **changed: object) -> tuple[ExpertWork, ...]:
    """Return work with one entry more, like the last but for what is changed."""
    return (*work, replace(work[-1], **changed))  # type: ignore[arg-type]


ANSWERS: dict[str, Callable[[StepResult], StepResult]] = {
    "one token more": lambda it: replace(it, tokens=(*it.tokens, SampledToken(it.tokens[0].sequence_id, 5))),
    "one token less": lambda it: replace(it, tokens=it.tokens[1:]),
    "a token of another sequence": lambda it: last(it, sequence_id=99),
    "a token of no vocabulary": lambda it: last(it, token_id=97),
    "a NaN log probability": lambda it: last(it, logprob=nan),
    "others than were asked for": lambda it: last(it, top_logprobs=((1, -0.5),)),
    "a fault of another sequence": lambda it: replace(
        it, faults=(SequenceFault(99, "internal_error", "no"),)
    ),
    "a fault of an unknown node": lambda it: replace(
        it, faults=(SequenceFault(it.tokens[0].sequence_id, "internal_error", "no", "mallory"),)
    ),
    "inflated work": lambda it: replace(it, expert_work=more(it.expert_work)),
    "work of an unknown set": lambda it: replace(it, expert_work=more(it.expert_work, expert_set=7)),
    "work in a layer that does not exist": lambda it: replace(it, expert_work=more(it.expert_work, layer=6)),
    "no work": lambda it: replace(it, expert_work=()),
    "no answer": lambda _: None,  # type: ignore[return-value,arg-type]
    "an answer to no step": lambda it: replace(it, step=[7]),  # type: ignore[arg-type]
    "an epoch that is no number": lambda it: replace(it, epoch=nan),  # type: ignore[arg-type]
}


def run(model: CutModel, lie: Callable[[_Deployment], list[int]] | None = None) -> _Deployment:
    """Run the prompts; with a lie, replace who is blamed for it, and go on."""
    deployment = _Deployment(model, BOUNDARIES, holders=2)
    deployment.add(PROMPTS, SAMPLING)
    liars = lie(deployment) if lie else []
    while deployment.pipeline.engine.num_sequences:
        before = deployment.pipeline.engine.num_completed
        try:
            deployment.step()
        except BadFrame as error:
            assert deployment.pipeline.engine.num_completed == before
            (sender,) = blamed(error, stage=error.sender).stages
            assert sender == liars.pop()
            deployment.lose(sender, nodes="other-")
    assert not liars
    return deployment


@pytest.fixture(scope="module")
def model(cut_model: Callable[[str], CutModel]) -> CutModel:
    return cut_model(FAMILY)


@pytest.fixture(scope="module")
def expected(model: CutModel) -> _Deployment:
    """The run in which every piece is honest."""
    return run(model)


def totals(work: Mapping[int, Work]) -> list[Counter[int]]:
    return [
        Counter({layer: sum(by.values()) for layer, by in one.items()}) for _, one in sorted(work.items())
    ]


@pytest.mark.parametrize("lie", few(ANSWERS.values(), 3), ids=ANSWERS)
def test_a_lie_of_the_last_stage_names_it_and_changes_no_answer(
    model: CutModel, expected: _Deployment, lie: Callable[[StepResult], StepResult]
) -> None:

    def install(deployment: _Deployment) -> list[int]:
        pipeline = deployment.pipeline
        through, steps = pipeline._through, iter(range(100))

        def lying(batch: StepBatch) -> StepResult:
            result = through(batch)
            is_time = next(steps) == HONEST_STEPS
            assert not is_time or result.tokens
            return lie(result) if is_time else result

        pipeline._through = lying  # type: ignore[method-assign]
        return [1]

    got = run(model, install)

    assert got.tokens == expected.tokens
    assert totals(got.work) == totals(expected.work), "what was refused is not paid"


RELAYED: dict[str, Callable[[StepBatch], StepBatch]] = {
    "inflated work": lambda it: replace(it, expert_work=more(it.expert_work)),
    "work of an unknown set": lambda it: replace(it, expert_work=more(it.expert_work, expert_set=7)),
    "work in a layer of others": lambda it: replace(it, expert_work=more(it.expert_work, layer=5)),
    "less work": lambda it: replace(it, expert_work=it.expert_work[1:]),
    "a fault of an unknown node": lambda it: replace(
        it, slices=it.slices, faults=(SequenceFault(99, "internal_error", "no", "mallory"),)
    ),
}


@pytest.mark.parametrize("lie", few(RELAYED.values()), ids=RELAYED)
def test_a_lie_that_a_stage_hands_on_names_that_stage(
    model: CutModel, expected: _Deployment, lie: Callable[[StepBatch], StepBatch]
) -> None:

    def install(deployment: _Deployment) -> list[int]:
        liar = deployment.pipeline.stages[0]
        honest, steps = liar.run, iter(range(100))

        def lying(batch: StepBatch, frame: bytes | None) -> Handoff | StepResult:
            output = honest(batch, frame)
            assert isinstance(output, Handoff)
            return replace(output, batch=lie(output.batch)) if next(steps) == HONEST_STEPS else output

        liar.run = lying  # type: ignore[method-assign]
        return [0]

    got = run(model, install)

    assert got.tokens == expected.tokens
    assert totals(got.work) == totals(expected.work)


def test_a_step_that_a_stage_shortens_is_refused_and_the_last_stage_named_for_it(model: CutModel) -> None:
    deployment = _Deployment(model, BOUNDARIES, holders=2)
    deployment.add(PROMPTS, SAMPLING)
    liar = deployment.pipeline.stages[0]
    honest = liar.run

    def shortened(batch: StepBatch, frame: bytes | None) -> Handoff | StepResult:
        kept, left_out = batch.slices[:-1], batch.slices[-1]
        tokens = batch.token_ids[: len(batch.token_ids) - left_out.num_tokens]
        opened = tuple(one for one in batch.opened if one.sequence_id != left_out.sequence_id)
        return honest(replace(batch, slices=kept, token_ids=tokens, opened=opened), frame)

    liar.run = shortened  # type: ignore[method-assign]

    # No stage knows what the step was: docs/trust.md says so.
    with pytest.raises(BadFrame) as refused:
        deployment.step()
    assert refused.value.sender == 1


# What is counted at both ends


def apart(model: CutModel) -> LocalPipeline:
    """Return a stage "r" that holds half of the experts, and the sets "a" and "b" with a quarter each."""
    whole = local_topology(model.structure, (0, 6))
    moe = [layer.index for layer in model.structure.layers if layer.num_experts]
    (stage,) = whole.stages
    stage = replace(stage, node_id="r", experts=dict.fromkeys(moe, (0, 1, 2, 3)))
    sets = (
        ExpertSet(0, "a", dict.fromkeys(moe, (4, 5)), 0),
        ExpertSet(1, "b", dict.fromkeys(moe, (6, 7)), 0),
    )
    return LocalPipeline(model.structure, replace(whole, stages=(stage,), expert_sets=sets), model.shards)


def shares(
    pipeline: LocalPipeline,
    *,
    router: Callable[[tuple[ExpertWork, ...]], tuple[ExpertWork, ...]] = lambda work: work,
    sets: Mapping[int, Callable[[Received], object]] | None = None,
) -> Counter[str]:
    """Run a prompt and return what each node is paid for, after all answers of the expert sets."""
    through = pipeline._through

    def lying(batch: StepBatch) -> StepResult:
        result = through(batch)
        return replace(result, expert_work=router(result.expert_work))

    pipeline._through = lying  # type: ignore[method-assign]
    (done,) = pipeline.generate([PROMPTS[1]], SAMPLING[:1])
    engine, paid = pipeline.engine, Counter[str]()
    reported = engine.take_reported()
    steps = [one.step for one in reported]
    received = {}
    for index, runner in pipeline.link.runners.items():
        got = runner.received.of(1, steps)
        assert got is not None
        answer = (sets or {}).get(index, lambda honest: honest)(got)
        if answer is not None:
            received[index] = check_received(answer, steps)
    engine.compare(reported, received)
    for work in (done.work, engine.taken_back(1)):
        for by_node in work.values():
            paid.update(by_node)
    assert engine.taken_back(1) == {}
    return +paid


@pytest.fixture(scope="module")
def honest(model: CutModel) -> Counter[str]:
    """What each node is paid where every piece is honest."""
    return shares(apart(model))


def moved(work: tuple[ExpertWork, ...], to: int | None) -> tuple[ExpertWork, ...]:
    """Have one holder be named for all work that it could have done: no token chooses an expert twice."""
    totals: Counter[int] = Counter()
    for one in work:
        totals[one.layer] += one.choices[1]
    return tuple(ExpertWork(layer, to, {1: total}) for layer, total in totals.items())


def times(received: Received, factor: int) -> Received:
    return {step: {layer: factor * got for layer, got in of.items()} for step, of in received.items()}


def test_where_both_ends_agree_nothing_is_the_platforms(honest: Counter[str]) -> None:
    assert honest.keys() == {"r", "a", "b"}
    assert all(honest.values())


@pytest.mark.parametrize("to", [None, 0])
def test_a_router_gains_nothing_by_counting_the_work_of_others(
    model: CutModel, honest: Counter[str], to: int | None
) -> None:
    paid = shares(apart(model), router=lambda work: moved(work, to))

    for node in ("r", "a", "b"):
        assert paid[node] <= honest[node], "who lies gains nothing, nor does one for whom it lies"
    assert paid["b"] == 0, "the router's word was smaller"
    assert paid.total() == honest.total(), "the platform has the rest"


def test_a_router_and_a_set_gain_nothing_together(model: CutModel, honest: Counter[str]) -> None:
    def agrees(received: Received) -> Received:
        return {step: dict.fromkeys(range(6), 10**9) for step in received}

    paid = shares(apart(model), router=lambda work: moved(work, 0), sets={0: agrees})

    assert paid["r"] + paid["a"] <= honest["r"] + honest["a"]
    assert paid.total() == honest.total()


@pytest.mark.parametrize("factor", [0, 2, 10**12])
def test_a_set_gains_nothing_by_another_count(model: CutModel, honest: Counter[str], factor: int) -> None:
    paid = shares(apart(model), sets={0: lambda received: times(received, factor)})

    assert paid["a"] == (honest["a"] if factor else 0)
    assert all(paid[node] <= honest[node] for node in ("r", "b"))
    assert paid.total() == honest.total()
    assert paid[PLATFORM_NODE] > 0


def test_a_set_that_does_not_answer_is_paid_by_its_routers_word(
    model: CutModel, honest: Counter[str]
) -> None:
    assert shares(apart(model), sets={0: lambda _: None}) == honest


def test_a_count_that_no_set_can_have_is_a_bad_frame(model: CutModel) -> None:
    with pytest.raises(FrameError):
        shares(apart(model), sets={1: lambda received: times(received, -1)})
