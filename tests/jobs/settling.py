"""A real process that takes jobs, runs them on a fake model and settles them until it is killed.

It can kill itself, with SIGKILL, before or after its n-th write. A job's tokens and work differ from process
to process, as if other nodes had run it.
"""

import asyncio
import os
import random
from collections.abc import Container
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

from azu.config.network import RetryPolicy
from azu.errors import WorkerLost
from azu.jobs import dispatch
from azu.jobs.dispatch import Dispatcher
from azu.jobs.redis import RedisJobs
from azu.jobs.settlement import Settlement
from azu.metrics import Meter
from azu.money.books import Books
from azu.protocol.job import FinishReason, Job, JobRun, TokenEvent
from azu.supervision import Supervisor, end_process
from tests.builders import OwnPipeline
from tests.killing import Death, kill_at_effect, start

# The jobs of these tests are as old as 1970.
PATIENCE = RetryPolicy(first_s=1, longest_s=1, budget_s=1, job_s=10**12)
EFFECTS = (
    (Books, "settle"),
    (RedisJobs, "set_state"),
    (RedisJobs, "append"),
    (RedisJobs, "finish"),
    (RedisJobs, "done"),
)

_NEVER = Death()


@dataclass(eq=False)
class FakeModel(OwnPipeline):
    """Produces random tokens on random nodes, and writes them as a pipeline does."""

    jobs: RedisJobs
    dice: random.Random
    cancelled: set[str] = field(default_factory=set)

    async def run(self, job: Job) -> JobRun:
        record = await self.jobs.get(job.job_id)
        assert record is not None
        produced, wanted = 0, self.dice.randint(0, job.sampling.max_tokens)
        while produced < wanted and job.job_id not in self.cancelled:
            await self.jobs.append([(job.job_id, TokenEvent(produced, (7,)))])
            produced += 1
            await asyncio.sleep(0.002)
        reason = FinishReason.CANCELLED if job.job_id in self.cancelled else FinishReason.STOP
        return JobRun(produced, reason, self._work(job.num_layers))

    phase = None

    async def look(self) -> None:
        raise WorkerLost("there is no pipeline to look at")

    async def cancel(self, job_id: str) -> None:
        self.cancelled.add(job_id)

    def let_go(self, job_id: str) -> None:
        pass

    def _work(self, num_layers: int) -> dict[int, dict[str, int]]:
        return {layer: {self.dice.choice("abc"): self.dice.randint(1, 9)} for layer in range(num_layers)}


@dataclass
class OneDeployment:
    """Gives every job the same model."""

    model: FakeModel

    async def ensure(self, model_id: str, revision: str, job_id: str) -> FakeModel:
        return self.model

    def keep_jobs(self, job_ids: Container[str]) -> tuple[()]:
        """Return nothing: no job is left behind here."""
        return ()

    async def phase_of(self, model_id: str, revision: str) -> None:
        """Return nothing: it is up."""


def start_settling(redis_url: str, books_url: str, *, death: Death = _NEVER, seed: int = 0) -> BaseProcess:
    """Start the process; it kills itself at the write that `death` names."""
    return start(settle_for_ever, redis_url, books_url, death, seed)


def settle_for_ever(redis_url: str, books_url: str, death: Death, seed: int) -> None:
    kill_at_effect(EFFECTS, death)
    # The next process soon gets the jobs that a dead process had taken.
    dispatch._TAKE_BLOCK_MS, dispatch._CLAIM_IDLE_MS = 50, 200
    asyncio.run(_settle(redis_url, books_url, random.Random(f"{seed}-{os.getpid()}")))


async def _settle(redis_url: str, books_url: str, dice: random.Random) -> None:
    jobs = RedisJobs.from_url(redis_url)
    settlement = Settlement(Books(books_url), jobs)
    model = FakeModel(jobs, dice)
    consumer = f"settling-{os.getpid()}"
    supervisor = Supervisor("settling", Meter(), end_process)
    dispatcher = Dispatcher(
        jobs, OneDeployment(model), settlement, consumer=consumer, patience=PATIENCE, supervisor=supervisor
    )
    await dispatcher.run()
