"""A lost stage is filled again with the rows that its sender stored: every sequence gets the same tokens."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import pytest
import torch

from azu.engine.accounting import Work
from azu.engine.local import LocalPipeline, local_topology
from azu.engine.scheduler import SchedulerConfig
from azu.engine.scheduler import Sequence as EngineSequence
from azu.engine.stage_contract import Handoff, OldEpoch
from azu.planner.migration import change_between
from azu.protocol.sampling import SamplingParams
from azu.protocol.topology import PieceSet, Stage
from tests.engine.conftest import CutModel
from tests.engine.families import VOCAB_SIZE
from tests.few import few

_BOUNDARIES = (0, 1, 3, 5, 6)
_SEEDED = SamplingParams(
    max_tokens=10, temperature=0.9, top_k=40, repetition_penalty=1.1, seed=7, ignore_eos=True
)
_GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


class _Deployment:
    """Real stages in this process; a test loses some of them between two completed steps."""

    def __init__(
        self,
        model: CutModel,
        boundaries: Sequence[int] = _BOUNDARIES,
        *,
        holders: int = 0,
        chunk: int = 8,
        num_blocks: int = 64,
    ) -> None:
        topology = local_topology(
            model.structure, boundaries, expert_holders=holders, num_blocks=num_blocks, block_size=4
        )
        scheduling = SchedulerConfig(num_blocks, 4, prefill_chunk_tokens=chunk)
        self.structure = model.structure
        self.pipeline = LocalPipeline(model.structure, topology, model.shards, scheduling)
        self.tokens: dict[int, list[int]] = {}
        self.work: dict[int, Work] = {}
        self.num_replays = 0

    def add(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> None:
        for sequence_id, (prompt, params) in enumerate(zip(prompts, sampling, strict=True), start=1):
            self.pipeline.engine.add(EngineSequence(sequence_id, tuple(prompt), params))
            self.tokens[sequence_id] = []

    def step(self) -> None:
        for sequence_id, event in self.pipeline.step().items():
            self.tokens[sequence_id] += event.token_ids
            if event.finish_reason is not None:
                self.work[sequence_id] = event.work

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        while self.pipeline.engine.num_sequences and not until():
            self.step()

    def lose(
        self,
        *stages: int,
        logs_gone: Collection[int] = (),
        nodes: str = "",
        alone: Collection[int] = (),
    ) -> None:
        """Replace stages by empty ones, on other nodes if `nodes` names them, and continue.

        Each of the sequences `alone` runs by itself until it comes further.
        """
        pipeline, engine = self.pipeline, self.pipeline.engine
        engine.suspend()
        self._run_in_flight_up_to(min(stages))
        pipeline.topology = replace(
            pipeline.topology,
            epoch=pipeline.topology.epoch + 1,
            stages=tuple(_moved(stage, stages, nodes) for stage in pipeline.topology.stages),
        )
        for index, stage in enumerate(pipeline.topology.stages):
            if index in stages:
                pipeline.stages[index] = pipeline.load_stage(stage)
            else:
                pipeline.stages[index].relink(pipeline.topology, pipeline.link)
        num_sent = {
            index: runner.num_sent(list(engine.num_cached))
            for index, runner in enumerate(pipeline.stages)
            if index not in logs_gone
        }
        engine.resume(pipeline.topology, stages, num_sent, alone)

    def change_boundaries(self, *boundaries: int) -> PieceSet:
        """Continue with stages between other boundaries; return those that had to be loaded."""
        pipeline, engine = self.pipeline, self.pipeline.engine
        engine.suspend()
        pipeline.in_flight.clear()
        before = pipeline.topology
        cut = local_topology(self.structure, boundaries, expert_holders=len(before.expert_sets))
        change = change_between(before, replace(before, epoch=before.epoch + 1, stages=cut.stages))
        pipeline.topology = change.topology
        kept = pipeline.stages
        pipeline.stages = [
            pipeline.load_stage(stage) if stage.index in change.fresh.stages else kept[stage.index]
            for stage in change.topology.stages
        ]
        for index, stage in enumerate(pipeline.stages):
            if index not in change.fresh.stages:
                stage.relink(change.topology, pipeline.link)
        num_sent = {
            index: stage.num_sent(list(engine.num_cached)) for index, stage in enumerate(pipeline.stages)
        }
        engine.resume(change.topology, change.fresh.stages, num_sent)
        return change.fresh

    def _run_in_flight_up_to(self, lost: int) -> None:
        """Run the steps in flight up to the lost stage: what they write must not matter."""
        for batch in self.pipeline.in_flight:
            frame: bytes | None = None
            for stage in self.pipeline.stages[:lost]:
                if batch.replay is None:
                    output = stage.run(batch, frame)
                    assert isinstance(output, Handoff)
                    batch, frame = output.batch, output.frame
        self.pipeline.in_flight.clear()


def _moved(stage: Stage, lost: Collection[int], nodes: str) -> Stage:
    return replace(stage, node_id=f"{nodes}{stage.index}") if nodes and stage.index in lost else stage


def _prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


_PROMPTS = _prompts(5, 21, 1, 9)
_SAMPLING = [_GREEDY, _SEEDED, _SEEDED, _GREEDY]


_UNDISTURBED: dict[tuple[str, int], _Deployment] = {}


def _undisturbed(model: CutModel, holders: int = 0) -> _Deployment:
    key = (model.structure.model_id, holders)
    if key not in _UNDISTURBED:
        _UNDISTURBED[key] = deployment = _Deployment(model, holders=holders)
        deployment.add(_PROMPTS, _SAMPLING)
        deployment.run()
    return _UNDISTURBED[key]


def _disturbed(model: CutModel, *losses: tuple[int, ...], after: int, **given: int) -> _Deployment:
    """Lose one set of stages after another, `after` completed steps apart."""
    deployment = _Deployment(model, **given)
    deployment.add(_PROMPTS, _SAMPLING)
    for lost in losses:
        for _ in range(after):
            deployment.step()
        deployment.lose(*lost)
    deployment.run()
    return deployment


_LOSSES = [(0,), (1,), (2,), (3,), (0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3)]
_FEW = {((1, 2), 9)}


@pytest.mark.parametrize(
    ("lost", "after"),
    [
        pytest.param(lost, after, marks=[] if (lost, after) in _FEW else pytest.mark.prove)
        for lost in _LOSSES
        for after in (1, 4, 9)
    ],
)
def test_lost_stages_change_no_token_and_no_share(
    cut_model: Callable[[str], CutModel], lost: tuple[int, ...], after: int
) -> None:
    model = cut_model("llama")
    expected = _undisturbed(model)

    got = _disturbed(model, lost, after=after)

    assert got.tokens == expected.tokens
    assert got.work == expected.work
    assert got.pipeline.engine.num_free_blocks == 64


@pytest.mark.prove
@pytest.mark.parametrize("family", few(["qwen2_moe", "bloom"]))  # distributed experts; padded batches
def test_padded_and_distributed_stages_are_filled_again_as_well(
    cut_model: Callable[[str], CutModel], family: str
) -> None:
    model = cut_model(family)
    holders = 2 if family == "qwen2_moe" else 0
    expected = _undisturbed(model, holders)

    got = _disturbed(model, (1,), (3,), (0,), after=4, holders=holders)

    assert got.tokens == expected.tokens
    assert got.work == expected.work


@pytest.mark.prove
def test_stages_lost_one_after_another_fill_each_other(cut_model: Callable[[str], CutModel]) -> None:
    model = cut_model("llama")
    # Stage 2 is filled from the log of a stage 1 that was itself filled before.
    got = _disturbed(model, (1,), (2,), (1,), (3,), (2,), after=3)

    assert got.tokens == _undisturbed(model).tokens


def test_sequences_that_run_alone_after_a_loss_get_the_same_tokens(
    cut_model: Callable[[str], CutModel],
) -> None:
    model = cut_model("llama")
    deployment = _Deployment(model)
    deployment.add(_PROMPTS, _SAMPLING)
    deployment.run(until=lambda: deployment.pipeline.engine.num_completed >= 6)
    deployment.lose(1, alone=(1, 3, 4))
    deployment.run()

    assert deployment.tokens == _undisturbed(model).tokens
    assert deployment.work == _undisturbed(model).work


def test_a_stage_lost_while_another_is_filled_again(cut_model: Callable[[str], CutModel]) -> None:
    model = cut_model("llama")
    deployment = _Deployment(model)
    deployment.add(_PROMPTS, _SAMPLING)
    for _ in range(8):
        deployment.step()
    deployment.lose(2)
    deployment.step()  # the first replay has run, others are in flight
    deployment.lose(1, 2)
    deployment.run()

    assert deployment.tokens == _undisturbed(model).tokens
    assert deployment.work == _undisturbed(model).work


_CUTS = {(0, 6): {0}, (0, 2, 4, 6): {0, 1, 2}, (0, 2, 3, 6): {1, 2}, (0, 2, 6): {1}}


@pytest.mark.parametrize(
    ("family", "cuts"),
    [
        ("llama", {(0, 1, 6): {1}}),
        pytest.param("llama", _CUTS, marks=pytest.mark.prove),
        pytest.param("qwen2_moe", _CUTS, marks=pytest.mark.prove),
    ],
)
def test_other_boundaries_change_no_token_and_no_layers_share(
    cut_model: Callable[[str], CutModel], family: str, cuts: dict[tuple[int, ...], set[int]]
) -> None:
    model = cut_model(family)
    holders = 2 if family == "qwen2_moe" else 0
    deployment = _Deployment(model, holders=holders)
    deployment.add(_PROMPTS, _SAMPLING)
    for boundaries, fresh in cuts.items():
        for _ in range(5):
            deployment.step()
        assert deployment.change_boundaries(*boundaries).stages == fresh
        deployment.step()
    deployment.run()

    expected = _undisturbed(model, holders)
    assert deployment.tokens == expected.tokens
    assert _by_layer(deployment) == _by_layer(expected)
    assert deployment.pipeline.engine.num_free_blocks == 64


@pytest.mark.prove
def test_boundaries_that_change_while_a_stage_is_filled_fill_the_new_stages(
    cut_model: Callable[[str], CutModel],
) -> None:
    model = cut_model("llama")
    deployment = _Deployment(model)
    deployment.add(_PROMPTS, _SAMPLING)
    for _ in range(8):
        deployment.step()
    deployment.lose(3)
    deployment.step()
    deployment.change_boundaries(0, 1, 6)
    deployment.run()

    assert deployment.tokens == _undisturbed(model).tokens


def _by_layer(deployment: _Deployment) -> dict[int, dict[int, int]]:
    """Return sequence -> layer -> bytes that all nodes together activated."""
    return {
        sequence_id: {layer: sum(by_node.values()) for layer, by_node in work.items()}
        for sequence_id, work in deployment.work.items()
    }


def test_a_sequence_without_stored_rows_is_computed_again_from_its_tokens(
    cut_model: Callable[[str], CutModel],
) -> None:
    model = cut_model("llama")
    deployment = _Deployment(model)
    deployment.add(_PROMPTS, _SAMPLING)
    for _ in range(7):
        deployment.step()
    deployment.lose(2, logs_gone=(1,))
    deployment.run()

    assert deployment.tokens == _undisturbed(model).tokens
    assert deployment.work == _undisturbed(model).work


def test_preempted_sequences_survive_a_loss(cut_model: Callable[[str], CutModel]) -> None:
    model = cut_model("llama")

    got = _disturbed(model, (2,), (1,), (3,), after=6, num_blocks=12)

    assert got.tokens == _undisturbed(model).tokens
    assert got.pipeline.engine.num_free_blocks == 12


def test_the_node_that_first_ran_a_token_is_paid_for_it(cut_model: Callable[[str], CutModel]) -> None:
    model = cut_model("llama")
    expected = _undisturbed(model)
    deployment = _Deployment(model)
    deployment.add(_PROMPTS, _SAMPLING)
    for _ in range(8):
        deployment.step()
    deployment.lose(1, nodes="spare-")
    deployment.run()

    for sequence_id, work in deployment.work.items():
        for layer, before in expected.work[sequence_id].items():
            assert sum(work[layer].values()) == sum(before.values())
            moved = layer in range(*_BOUNDARIES[1:3])
            assert set(work[layer]) == ({"stage-1", "spare-1"} if moved else set(before))


def test_a_step_of_an_old_epoch_is_refused(cut_model: Callable[[str], CutModel]) -> None:
    deployment = _Deployment(cut_model("llama"))
    deployment.add(_PROMPTS, _SAMPLING)
    deployment.step()
    late = deployment.pipeline.in_flight[0]
    deployment.lose(1)

    with pytest.raises(OldEpoch):
        deployment.pipeline.stages[0].run(late, None)


def test_rows_of_finished_sequences_are_dropped(cut_model: Callable[[str], CutModel]) -> None:
    deployment = _Deployment(cut_model("llama"))
    deployment.add([_PROMPTS[0], _PROMPTS[1]], [SamplingParams(max_tokens=2, ignore_eos=True), _GREEDY])
    deployment.run()

    for stage in deployment.pipeline.stages[:-1]:
        assert set(stage.num_sent([1, 2])) == {2}  # sequence 2 has ended too, but no later step closed it
