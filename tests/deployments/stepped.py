"""The real engine and job runner behind the ingress; its one stage is the test, which answers each step."""

import asyncio
from collections.abc import Container

from tokenizers import Tokenizer, decoders, models

from azu.engine.pipeline import EnginePipeline
from azu.engine.scheduler import SchedulerConfig
from azu.engine.text import TextDecoder
from azu.engine.timing import PipelineMetrics
from azu.errors import WorkerLost
from azu.jobs.job_runner import JobRunner
from azu.jobs.redis import RedisJobs
from azu.metrics import Meter
from azu.protocol.job import Job, JobRun
from azu.protocol.step import SampledToken, StepBatch, StepResult
from azu.supervision import Supervisor
from tests.builders import OwnPipeline, structure, topology

NUM_LAYERS = 6  # of azu/tiny-dense
CHUNK_TOKENS = 4
TOKEN = 70


async def _ask() -> None:
    """Ask expert sets for their work: there are none."""


class SteppedModel(OwnPipeline):
    """A deployment of every model on one node of OWNERS[0]; steps wait until `step` or `keep_stepping`."""

    phase = None

    def __init__(self, jobs: RedisJobs) -> None:
        config = SchedulerConfig(256, 16, prefill_chunk_tokens=CHUNK_TOKENS, micro_batches=1)
        self.engine = EnginePipeline(
            structure(NUM_LAYERS), topology({"node": (0, NUM_LAYERS)}), config, ends=(2,)
        )
        decoder = Tokenizer(models.WordLevel({"a": 5}, unk_token="a"))
        decoder.decoder = decoders.Fuse()
        metrics = PipelineMetrics("stepped", 256, Meter())
        self.runner = JobRunner(self.engine, jobs, TextDecoder(decoder), metrics, self._send, _ask)
        self.sent: list[StepBatch] = []
        self.num_steps = 0
        self._supervisor = Supervisor("stepped", Meter(), replace=lambda: None)
        self._supervisor.start("tokens", self.runner.write)

    def _send(self) -> None:
        while self.runner.takes_tokens and (batch := self.engine.next_batch()) is not None:
            self.sent.append(batch)

    async def step(self, count: int = 1) -> None:
        """Answer the next steps with one token for each sequence that samples."""
        for _ in range(count):
            await self.until_sent()
            batch = self.sent.pop(0)
            tokens = tuple(SampledToken(one.sequence_id, TOKEN) for one in batch.slices if one.sample)
            self.num_steps += 1
            self.runner.complete(StepResult(batch.epoch, batch.step, batch.micro_batch, tokens))

    async def until_sent(self) -> None:
        """Wait until a step waits for its answer."""
        async with asyncio.timeout(60):
            while not self.sent:
                await asyncio.sleep(0.001)

    async def keep_stepping(self) -> None:
        """Answer every step, until cancelled."""
        while True:
            if self.sent:
                await self.step()
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        await self._supervisor.stop()

    async def ensure(self, model_id: str, revision: str, job_id: str) -> "SteppedModel":
        return self

    def keep_jobs(self, job_ids: Container[str]) -> tuple[()]:
        """Return nothing: no job is left behind here."""
        return ()

    async def phase_of(self, model_id: str, revision: str) -> None:
        """Return nothing: it is up."""

    async def run(self, job: Job) -> JobRun:
        return await self.runner.run(job)

    async def cancel(self, job_id: str) -> None:
        self.runner.cancel(job_id)

    async def look(self) -> None:
        raise WorkerLost("there is no pipeline to look at")

    def let_go(self, job_id: str) -> None:
        pass
