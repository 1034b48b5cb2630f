"""KV pools that shrink and grow while sequences run: the sequences end with the same tokens."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from azu.engine.scheduler import BatchScheduler, SchedulerConfig, Sequence
from azu.errors import Unavailable
from azu.protocol.sampling import SamplingParams
from tests.engine.conftest import CutModel
from tests.engine.test_replay import _PROMPTS, _SAMPLING, _Deployment, _undisturbed
from tests.few import few

_LEAST = 9  # blocks of four tokens: the longest of the sequences alone


@pytest.fixture
def dense(cut_model: Callable[[str], CutModel]) -> CutModel:
    return cut_model("llama")


def _resize(deployment: _Deployment, num_blocks: int) -> None:
    pipeline, engine = deployment.pipeline, deployment.pipeline.engine
    num_blocks = engine.limit(num_blocks)
    engine.suspend()
    pipeline.in_flight.clear()
    epoch = pipeline.topology.epoch + 1
    pipeline.topology = replace(pipeline.topology, epoch=epoch, num_blocks=num_blocks)
    for stage in pipeline.stages:
        stage.relink(pipeline.topology, pipeline.link)
    engine.resume(pipeline.topology, (), {})


@pytest.mark.parametrize("after", few([6, 1, 3, 11]))
def test_sequences_that_lose_blocks_are_computed_again_with_the_same_tokens(
    dense: CutModel, after: int
) -> None:
    undisturbed = _undisturbed(dense)
    deployment = _Deployment(dense)
    deployment.add(_PROMPTS, _SAMPLING)
    for num_blocks in (20, _LEAST, 64, 1):
        for _ in range(after):
            deployment.step()
        _resize(deployment, num_blocks)
    deployment.run()

    assert deployment.tokens == undisturbed.tokens
    assert deployment.work == undisturbed.work, "tokens that are computed again are not paid for"
    assert deployment.pipeline.engine.num_preempted > 0


def test_a_removed_block_is_never_used_again(dense: CutModel) -> None:
    deployment = _Deployment(dense)
    deployment.add(_PROMPTS, _SAMPLING)
    for _ in range(5):
        deployment.step()
    _resize(deployment, _LEAST)

    def uses_few() -> bool:
        used = [
            block for step in deployment.pipeline.in_flight for one in step.slices for block in one.block_ids
        ]
        assert max(used, default=0) < _LEAST
        return False

    deployment.run(uses_few)


def test_the_longest_accepted_sequence_keeps_its_blocks_and_a_longer_one_is_refused() -> None:
    scheduler = BatchScheduler(SchedulerConfig(num_blocks=100, block_size=4), num_stages=1)
    scheduler.add(Sequence(1, (1,) * 40, SamplingParams(max_tokens=1)))

    assert scheduler.limit(3) == 10

    scheduler.add(Sequence(2, (1,) * 40, SamplingParams(max_tokens=1)))
    with pytest.raises(Unavailable):
        scheduler.add(Sequence(3, (1,) * 41, SamplingParams(max_tokens=1)))
    scheduler.resize(10)
    assert scheduler.num_free_blocks == 10
