"""KV pools that shrink and grow under running sequences: each ends as if nothing had happened."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from azu.engine.scheduler import BatchScheduler, SchedulerConfig, Sequence
from azu.errors import Unavailable
from azu.protocol.sampling import SamplingParams
from tests.engine.conftest import CutModel
from tests.engine.test_replay import _PROMPTS, _SAMPLING, _Deployment, _undisturbed

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


@pytest.mark.parametrize("after", [1, 3, 6, 11])
def test_sequences_whose_blocks_go_are_computed_again_to_the_same_end(dense: CutModel, after: int) -> None:
    undisturbed = _undisturbed(dense)
    deployment = _Deployment(dense)
    deployment.add(_PROMPTS, _SAMPLING)
    for num_blocks in (20, _LEAST, 64, 1):
        for _ in range(after):
            deployment.step()
        _resize(deployment, num_blocks)
    deployment.run()

    assert deployment.tokens == undisturbed.tokens
    assert deployment.work == undisturbed.work, "what is computed again is paid to nobody"
    assert deployment.pipeline.engine.num_preempted > 0


def test_no_block_that_is_gone_is_ever_used_again(dense: CutModel) -> None:
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


def test_the_longest_that_was_taken_keeps_its_room_and_a_longer_one_is_refused() -> None:
    scheduler = BatchScheduler(SchedulerConfig(num_blocks=100, block_size=4), num_stages=1)
    scheduler.add(Sequence(1, (1,) * 40, SamplingParams(max_tokens=1)))

    assert scheduler.limit(3) == 10

    scheduler.add(Sequence(2, (1,) * 40, SamplingParams(max_tokens=1)))
    with pytest.raises(Unavailable):
        scheduler.add(Sequence(3, (1,) * 41, SamplingParams(max_tokens=1)))
    scheduler.resize(10)
    assert scheduler.num_free_blocks == 10
