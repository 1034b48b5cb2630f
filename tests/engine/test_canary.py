"""The canary runs behind all jobs, is not paid, and compares only tokens that are in no doubt."""

import asyncio
import itertools

import pytest

from azu.engine.canary import Canary, CanaryAnswer
from azu.engine.pipeline import EnginePipeline
from azu.engine.scheduler import SchedulerConfig, Sequence
from azu.errors import InternalError, WorkerLost
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import SampledToken, SequenceFault, StepBatch, StepResult
from tests import builders

TOKENS = (1, 2, 3, 4, 5, 6)


def answer(*margins: float, tokens: tuple[int, ...] = TOKENS) -> CanaryAnswer:
    return CanaryAnswer((tokens[: len(margins)],), (margins,))


@pytest.mark.parametrize(
    ("other", "agrees"),
    [
        (TOKENS, True),
        ((1, 2, 3, 9, 9, 9), True),  # the fourth is in doubt: all after it may differ
        ((1, 2, 9, 4, 5, 6), False),
        ((1, 2), False),
        ((), False),
    ],
)
def test_tokens_count_up_to_the_first_that_is_in_doubt(other: tuple[int, ...], agrees: bool) -> None:
    known = answer(5.0, 2.0, 1.0, 0.9, 5.0, 5.0)

    assert known.agrees(CanaryAnswer((other,), ((9.0,) * len(other),))) is agrees
    assert not known.agrees(CanaryAnswer((TOKENS, TOKENS), ((), ())))


def test_an_answer_is_clear_with_enough_clear_tokens() -> None:
    assert answer(5.0, 5.0, 5.0, 5.0).is_clear
    assert not answer(5.0, 5.0, 5.0).is_clear
    assert not answer(5.0, 0.1, 5.0, 5.0, 5.0).is_clear
    assert CanaryAnswer(((1, 2), (3, 4)), ((5.0, 5.0), (5.0, 5.0))).is_clear


class Engine:
    """An engine with a canary, whose stages the test plays."""

    def __init__(self) -> None:
        self.pipeline = EnginePipeline(
            builders.structure(4), builders.topology({"a": (0, 4)}), SchedulerConfig(64, 4), ()
        )
        self.canary = Canary(self.pipeline, itertools.count(100), lambda: None)

    async def step(self, *faults: SequenceFault) -> tuple[StepBatch, dict[int, object]]:
        await asyncio.sleep(0)
        batch = self.pipeline.next_batch()
        assert batch is not None
        failed = {fault.sequence_id for fault in faults}
        sampled = [one.sequence_id for one in batch.slices if one.sample and one.sequence_id not in failed]
        tokens = tuple(
            SampledToken(key, 9, -0.5, ((9, -0.5), (8, -2.5))) if key >= 100 else SampledToken(key, 7)
            for key in sampled
        )
        result = StepResult(batch.epoch, batch.step, batch.micro_batch, tokens, faults)
        return batch, dict(self.canary.take(self.pipeline.complete(result)))


def test_the_canary_answers_beside_a_job_and_only_the_job_has_events_and_work() -> None:
    async def scenario() -> None:
        engine = Engine()
        asking = asyncio.create_task(engine.canary.ask([(5, 6), (5, 6, 7)]))
        await asyncio.sleep(0)
        engine.pipeline.add(Sequence(1, (5, 6), SamplingParams(max_tokens=20)))
        work = {}
        for _ in range(20):
            batch, events = await engine.step()
            assert batch.slices[0].sequence_id == 1, "the job comes first, although it came later"
            assert events.keys() == {1}
            work |= events[1].work  # type: ignore[attr-defined]

        found = await asking
        assert found == CanaryAnswer(((9,) * 8, (9,) * 8), ((2.0,) * 8, (2.0,) * 8))
        assert sum(sum(by_node.values()) for by_node in work.values()) > 0
        assert engine.pipeline.num_sequences == 0
        assert engine.pipeline.num_free_blocks == 64

    asyncio.run(scenario())


def test_the_watchdog_sees_only_jobs() -> None:
    async def scenario() -> None:
        engine = Engine()
        asking = asyncio.create_task(engine.canary.ask([(5, 6)]))
        await engine.step()

        assert engine.pipeline.positions == {}
        asking.cancel()

    asyncio.run(scenario())


def test_a_canary_that_fails_says_so_and_leaves_nothing() -> None:
    async def scenario() -> None:
        engine = Engine()
        asking = asyncio.create_task(engine.canary.ask([(5, 6), (6, 7)]))
        await engine.step(SequenceFault(100, "internal_error", "it cannot be computed"))
        with pytest.raises(InternalError, match="cannot be computed"):
            await asking
        await asyncio.sleep(0)
        assert engine.pipeline.num_sequences == 0

        asking = asyncio.create_task(engine.canary.ask([(5, 6)]))
        await asyncio.sleep(0)
        engine.canary.fail(WorkerLost("all is lost"))
        with pytest.raises(WorkerLost):
            await asking
        assert engine.pipeline.num_sequences == 0

    asyncio.run(scenario())


def test_a_canary_whose_caller_gives_up_leaves_nothing() -> None:
    async def scenario() -> None:
        engine = Engine()
        asking = asyncio.create_task(engine.canary.ask([(5, 6)]))
        await engine.step()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert engine.pipeline.num_sequences == 0

    asyncio.run(scenario())


def test_prompts_that_are_none_of_the_model_are_left_out() -> None:
    pipeline = Engine().pipeline

    assert pipeline.takes((0, 255))
    assert not pipeline.takes((0, 256))
    assert not pipeline.takes(())
    assert not pipeline.takes((1,) * 300)
