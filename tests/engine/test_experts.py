"""Distributed experts: only routed tokens are sent, and an expert set runs only the experts that it holds."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from azu.engine.experts import ExpertRunner, StepId, TokenSlices, decode_answer, encode_answer
from azu.engine.local import local_topology
from azu.engine.stage_contract import ExpertsFailed, RowsNotFinite, StageSpec, is_bad_frame
from azu.engine.stage_runner import StageRunner
from azu.engine.tensors import tensor_of
from azu.errors import FrameError, WorkerLost
from azu.protocol.frame import Frame
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import OpenedSequence, Slice, StepBatch, StepResult
from azu.protocol.topology import ExpertSet, Stage
from tests.engine.conftest import CutModel

_STEP = StepId(epoch=1, step=2, micro_batch=0, stage=0)


def _runner(model: CutModel, *experts: int) -> ExpertRunner:
    return ExpertRunner(model.structure, {1: experts}, model.paths(), model.shards, "cpu")


def _request(ids: list[list[int]], *, width: int = 64, value: float = 1.0) -> bytes:
    hidden = torch.full((len(ids), width), value)
    return TokenSlices(_STEP, hidden, torch.tensor(ids), torch.full((len(ids), len(ids[0])), 0.5)).encode()


def _answer(runner: ExpertRunner, ids: list[list[int]]) -> torch.Tensor:
    return tensor_of(Frame.decode(runner.run(1, _request(ids))), torch.device("cpu"))


def test_experts_of_two_holders_add_up_to_one_holder_of_all(cut_model: Callable[[str], CutModel]) -> None:
    model = cut_model("mixtral")
    whole = _answer(_runner(model, *range(8)), [[1, 6], [6, 3]])
    # The order of a holder's experts does not matter.
    odd = _answer(_runner(model, 3, 1), [[1, -1], [-1, 3]])
    even = _answer(_runner(model, 0, 6), [[-1, 6], [6, -1]])

    torch.testing.assert_close(odd + even, whole)


def test_choices_of_other_experts_add_nothing(cut_model: Callable[[str], CutModel]) -> None:
    assert not _answer(_runner(cut_model("mixtral"), 2), [[-1, -1]]).any()


@pytest.mark.parametrize(
    ("layer", "request_bytes"),
    [
        (0, _request([[1, 3]])),
        (1, _request([[1, 2]])),
        (1, _request([[1, 8]])),
        (1, _request([[1, -2]])),
        (1, _request([[1, 3]], width=32)),
        (1, _request([[1, 3]], value=float("nan"))),
        (1, _request([[1, 3]])[:-1]),
        (1, _request([[1, 3]])[:60]),
        (1, b""),
    ],
)
def test_a_bad_request_is_refused(
    cut_model: Callable[[str], CutModel], layer: int, request_bytes: bytes
) -> None:
    with pytest.raises(FrameError):
        _runner(cut_model("mixtral"), 1, 3).run(layer, request_bytes)


@dataclass
class _Link:
    """Runs expert sets in place and records each request: expert set, layer, number of tokens."""

    runners: dict[int, ExpertRunner]
    asked: list[tuple[int, int, int]] = field(default_factory=list)
    lost: int | None = None
    answer: object = None  # in place of the experts' own

    def start(self, expert_set: int, layer: int, request: bytes) -> "_Pending":
        tokens = len(TokenSlices.decode(request, torch.device("cpu")).hidden)
        self.asked.append((expert_set, layer, tokens))
        return _Pending(self, expert_set, layer, request)


@dataclass
class _Pending:
    link: _Link
    expert_set: int
    layer: int
    request: bytes

    def result(self, timeout_s: float) -> bytes:
        assert timeout_s > 0
        if self.link.lost == self.expert_set:
            raise WorkerLost(f"expert set {self.expert_set} is gone")
        if isinstance(self.link.answer, Exception):
            raise self.link.answer
        return self.link.answer or self.link.runners[self.expert_set].run(self.layer, self.request)


def _stage(
    model: CutModel, sets: tuple[ExpertSet, ...], local: dict[int, tuple[int, ...]], link: _Link
) -> StageRunner:
    whole = local_topology(model.structure, (0, 6), num_blocks=8, block_size=4)
    stage = Stage(0, "router", whole.stages[0].span, local, 0)
    topology = replace(whole, stages=(stage,), expert_sets=sets)
    return StageRunner(StageSpec(model.structure, stage, topology, model.paths(), model.shards, "cpu"), link)


def _run(runner: StageRunner, num_tokens: int = 9) -> StepResult:
    tokens = tuple(range(5, 5 + num_tokens))
    batch = StepBatch(
        epoch=1,
        step=1,
        micro_batch=0,
        slices=(Slice(1, 0, num_tokens, (0, 1, 2), sample=True, sequence_length=num_tokens),),
        token_ids=tokens,
        opened=(OpenedSequence(1, SamplingParams(max_tokens=1, logprobs=5)),),
    )
    result = runner.run(batch, None)
    assert isinstance(result, StepResult)
    return result


def _everywhere(model: CutModel, experts: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    return {layer.index: experts for layer in model.structure.layers if layer.num_experts}


def _link(model: CutModel, *sets: ExpertSet) -> _Link:
    return _Link(
        {s.index: ExpertRunner(model.structure, s.experts, model.paths(), model.shards, "cpu") for s in sets}
    )


def test_experts_partly_beside_the_router_give_the_same_tokens(cut_model: Callable[[str], CutModel]) -> None:
    model = cut_model("mixtral")
    whole = _run(_stage(model, (), _everywhere(model, tuple(range(8))), _Link({})))
    apart = ExpertSet(0, "elsewhere", _everywhere(model, (0, 2, 5)), 0)
    link = _link(model, apart)

    mixed = _run(_stage(model, (apart,), _everywhere(model, (1, 3, 4, 6, 7)), link))

    assert mixed.tokens[0].token_id == whole.tokens[0].token_id
    assert mixed.tokens[0].logprob == pytest.approx(whole.tokens[0].logprob, abs=1e-4)
    assert whole.expert_work == ()
    # Nine tokens choose two of eight experts each: fewer than nine are sent.
    assert 0 < max(tokens for _, _, tokens in link.asked) < 9


def test_replicas_share_the_tokens_and_change_nothing(cut_model: Callable[[str], CutModel]) -> None:
    model = cut_model("mixtral")
    whole = _run(_stage(model, (), _everywhere(model, tuple(range(8))), _Link({})))
    replicas = tuple(ExpertSet(i, f"node-{i}", _everywhere(model, tuple(range(8))), 0) for i in range(2))
    link = _link(model, *replicas)

    result = _run(_stage(model, replicas, _everywhere(model, ()), link))

    assert result.tokens[0].token_id == whole.tokens[0].token_id
    asked = Counter(expert_set for expert_set, _, _ in link.asked)
    assert asked[0] == asked[1] == 6  # both in every layer, once each


def test_every_choice_is_counted_at_the_node_that_ran_it(cut_model: Callable[[str], CutModel]) -> None:
    model = cut_model("mixtral")
    sets = tuple(ExpertSet(i, f"node-{i}", _everywhere(model, tuple(range(i, 8, 2))), 0) for i in range(2))
    link = _link(model, *sets)

    result = _run(_stage(model, sets, _everywhere(model, ()), link))

    for layer in range(6):
        said = {one.expert_set: one.choices[1] for one in result.expert_work if one.layer == layer}
        assert said.keys() == {0, 1}
        assert sum(said.values()) == 9 * 2
        got = {index: runner.received.of(1, [1]) for index, runner in link.runners.items()}
        assert {index: one and one[1][layer] for index, one in got.items()} == said


def test_a_lost_expert_set_fails_the_step_and_is_named(cut_model: Callable[[str], CutModel]) -> None:
    model = cut_model("mixtral")
    apart = ExpertSet(0, "elsewhere", _everywhere(model, tuple(range(8))), 0)
    link = _link(model, apart)
    runner = _stage(model, (apart,), _everywhere(model, ()), link)
    link.lost = 0

    with pytest.raises(WorkerLost, match="expert set 0"):
        _run(runner)


@pytest.mark.parametrize(
    "answer", [7, "x", [b""], b"x", RowsNotFinite(("x",)), RowsNotFinite(((),)), RowsNotFinite([True])]
)
def test_a_set_that_answers_rubbish_fails_the_step_and_is_named(
    cut_model: Callable[[str], CutModel], answer: object
) -> None:
    model = cut_model("mixtral")
    apart = ExpertSet(0, "elsewhere", _everywhere(model, tuple(range(8))), 0)
    link = _link(model, apart)
    runner = _stage(model, (apart,), _everywhere(model, ()), link)
    link.answer = answer

    with pytest.raises(ExpertsFailed) as failed:
        _run(runner)
    assert failed.value.expert_set == 0
    assert is_bad_frame(failed.value) is not isinstance(answer, RowsNotFinite)


def test_only_the_answer_to_the_same_request_is_accepted() -> None:
    sent = TokenSlices(_STEP, torch.ones(1, 64), torch.tensor([[1, 3]]), torch.ones(1, 2))
    request, sums = sent.encode(), torch.ones(1, 64)

    def answered(
        *, step: StepId = _STEP, to: bytes = request, layer: int = 1, sums: torch.Tensor = sums
    ) -> torch.Tensor:
        answer = encode_answer(sums, to, step, layer)
        return decode_answer(answer, request, sent, 1, torch.device("cpu"))

    assert torch.equal(answered(), sums)
    with pytest.raises(FrameError, match="step 1"):
        answered(step=replace(_STEP, step=1))
    with pytest.raises(FrameError, match="size"):
        answered(sums=torch.ones(2, 64))
    with pytest.raises(FrameError, match="another request"):
        answered(layer=2)
    with pytest.raises(FrameError, match="another request"):
        answered(to=replace(sent, hidden=torch.zeros(1, 64)).encode())


def test_a_request_with_parts_of_two_steps_is_refused() -> None:
    one = TokenSlices(_STEP, torch.ones(1, 64), torch.tensor([[1, 3]]), torch.ones(1, 2)).encode()
    later = replace(_STEP, step=3)
    other = TokenSlices(later, torch.ones(1, 64), torch.tensor([[1, 3]]), torch.ones(1, 2)).encode()
    first_part = 8 + int.from_bytes(one[:8], "little")

    with pytest.raises(FrameError, match="different steps"):
        TokenSlices.decode(one[:first_part] + other[first_part:], torch.device("cpu"))


def test_replicas_take_over_at_once_for_a_lost_set_and_are_paid(
    cut_model: Callable[[str], CutModel],
) -> None:
    model = cut_model("mixtral")
    whole = _run(_stage(model, (), _everywhere(model, tuple(range(8))), _Link({})))
    sets = (
        ExpertSet(0, "first", _everywhere(model, (0, 1, 2, 3)), 0),
        ExpertSet(1, "second", _everywhere(model, (0, 1)), 0, is_replica=True),
        ExpertSet(2, "third", _everywhere(model, (2, 3)), 0, is_replica=True),
    )
    link = _link(model, *sets)
    link.lost = 0
    runner = _stage(model, sets, _everywhere(model, (4, 5, 6, 7)), link)
    result = _run(runner)

    assert [token.token_id for token in result.tokens] == [token.token_id for token in whole.tokens]
    assert {work.expert_set for work in result.expert_work} == {None, 1, 2}
    per_layer = Counter(layer for chosen, layer, _ in link.asked if chosen == 0)
    assert set(per_layer.values()) == {1}, "the lost set gets one request a layer and no other"
    assert sum(sum(counts) for counts in runner.num_chosen().values()) == 9 * 2 * len(per_layer)


def test_a_lost_set_is_to_blame_when_one_of_its_experts_has_no_replica(
    cut_model: Callable[[str], CutModel],
) -> None:
    model = cut_model("mixtral")
    sets = (
        ExpertSet(0, "first", _everywhere(model, (0, 1, 2, 3)), 0),
        ExpertSet(1, "second", _everywhere(model, (0,)), 0, is_replica=True),
    )
    link = _link(model, *sets)
    link.lost = 0
    with pytest.raises(ExpertsFailed, match="expert set 0"):
        _run(_stage(model, sets, _everywhere(model, (4, 5, 6, 7)), link))


def test_a_lost_set_is_to_blame_later_for_an_expert_that_only_it_holds(
    cut_model: Callable[[str], CutModel],
) -> None:
    model = cut_model("mixtral")
    sets = (
        ExpertSet(0, "first", _everywhere(model, (0, 1, 2, 3)), 0),
        ExpertSet(1, "second", _everywhere(model, (0, 1)), 0, is_replica=True),
    )
    link = _link(model, *sets)
    runner = _stage(model, sets, _everywhere(model, (4, 5, 6, 7)), link)
    _run(runner)
    link.lost = 0
    layer, hidden, weights = runner._distributed_layers[0], torch.ones(9, 64), torch.full((9, 2), 0.5)

    with torch.inference_mode():
        layer(hidden, torch.tensor([[0, 1]] * 9), weights)
        with pytest.raises(ExpertsFailed, match="expert set 0"):
            layer(hidden, torch.tensor([[2, 4]] * 9), weights)


class _NeverFinite:
    """An expert set whose sums are never finite."""

    def run(self, _layer: int, request: bytes) -> bytes:
        raise RowsNotFinite(tuple(range(len(TokenSlices.decode(request, torch.device("cpu")).hidden))))


def test_rows_whose_sums_are_not_finite_are_named(cut_model: Callable[[str], CutModel]) -> None:
    hidden = torch.stack([torch.ones(64), torch.full((64,), 3e38), torch.ones(64)])
    request = TokenSlices(_STEP, hidden, torch.tensor([[1, 3]] * 3), torch.full((3, 2), 0.5)).encode()

    with pytest.raises(RowsNotFinite) as named:
        _runner(cut_model("mixtral"), 1, 3).run(1, request)
    assert named.value.rows == (1,)


@pytest.mark.parametrize("copies", [1, 2])
def test_values_that_no_holder_of_the_experts_has_finite_are_the_sequences_fault(
    cut_model: Callable[[str], CutModel], copies: int
) -> None:
    model = cut_model("mixtral")
    sets = tuple(ExpertSet(i, f"node-{i}", _everywhere(model, tuple(range(8))), 0) for i in range(copies))
    link = _Link({one.index: _NeverFinite() for one in sets})  # type: ignore[dict-item]

    result = _run(_stage(model, sets, _everywhere(model, ()), link))

    (fault,) = result.faults
    assert result.tokens == ()
    assert (fault.sequence_id, fault.code, fault.layer) == (1, "numerics_error", 0)
    assert fault.node_id in {"node-0", "node-1"}
    assert "layer 0 " in fault.message


def test_a_set_is_to_blame_for_values_that_another_holder_has_finite(
    cut_model: Callable[[str], CutModel],
) -> None:
    model = cut_model("mixtral")
    sets = tuple(ExpertSet(i, f"node-{i}", _everywhere(model, tuple(range(8))), 0) for i in range(2))
    link = _link(model, *sets)
    link.runners[1] = _NeverFinite()  # type: ignore[assignment]

    with pytest.raises(ExpertsFailed, match="expert set 1") as failed:
        _run(_stage(model, sets, _everywhere(model, ()), link))
    assert is_bad_frame(failed.value)


def test_tokens_that_are_not_finite_are_not_sent_and_change_no_other(
    cut_model: Callable[[str], CutModel],
) -> None:
    model = cut_model("mixtral")
    sets = (ExpertSet(0, "elsewhere", _everywhere(model, (0, 1, 2, 3)), 0),)
    link = _link(model, *sets)
    runner = _stage(model, sets, _everywhere(model, (4, 5, 6, 7)), link)
    _run(runner)
    layer, weights = runner._distributed_layers[0], torch.full((9, 2), 0.5)
    hidden, ids = torch.randn(9, 64), torch.tensor([[0, 5]] * 9)
    with torch.inference_mode():
        expected = layer(hidden, ids, weights)
        link.asked.clear()
        hidden[4, 7] = torch.inf
        out = layer(hidden, ids, weights)

    assert out[4].isnan().all()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(out[others], expected[others])
    assert link.asked == [(0, 0, 8)]
