"""JobRunner: runs jobs as sequences of an engine's pipeline, and writes their tokens to Redis."""

import asyncio
import itertools
import logging
import struct
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import xxhash

from azu.engine.accounting import Work
from azu.engine.canary import TEXTS as CANARY_TEXTS
from azu.engine.canary import Canary, CanaryAnswer
from azu.engine.pipeline import EnginePipeline
from azu.engine.scheduler import Sequence
from azu.engine.text import TextDecoder
from azu.engine.timing import PipelineMetrics
from azu.errors import AzuError
from azu.jobs.redis import RedisJobs
from azu.logs import log_context
from azu.protocol.job import ChoiceKey, FinishReason, Job, JobRun, PipelineLook, TokenEvent
from azu.protocol.phase import JobPhase, queued, reading
from azu.protocol.step import StepResult
from azu.redis_client import retry_until_available
from azu.supervision import as_known_error

log = logging.getLogger(__name__)

# A job with several choices has ended as the choice that comes last here.
_BEST_FIRST = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.ERROR)
_SEED = struct.Struct("<QQ")
_SEED_RANGE = 2**63
# Steps whose tokens are computed and not written, while Redis is away or slow; more are not sent. They are
# written together: a client that hangs up at the first of them pays for all.
_MAX_UNWRITTEN_STEPS = 64
# A scheduler may die before it hears how a job ended; the next scheduler asks again.
_KEPT_JOBS = 1000


@dataclass(slots=True)
class _ActiveJob:
    """A job whose choices have not all ended; `open` has the sequences of those that have not."""

    job: Job
    ended: asyncio.Future[JobRun]
    open: set[int] = field(default_factory=set)
    sequences: list[int] = field(default_factory=list)  # of all choices that ran here
    delivered: int = 0
    prompt_tokens_ran: int = 0
    cancelled: bool = False
    error: AzuError | None = None
    reason: FinishReason = FinishReason.STOP
    work: defaultdict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def end_choice(self, reason: FinishReason, work: Work, prompt_tokens_ran: int = 0) -> None:
        """Count a choice that has ended; all of them have one prompt."""
        self.reason = max(self.reason, reason, key=_BEST_FIRST.index)
        self.prompt_tokens_ran = max(self.prompt_tokens_ran, prompt_tokens_ran)
        self.count(work)

    def count(self, work: Work) -> None:
        """Add work, or take some back."""
        for layer, by_node in work.items():
            self.work[layer].update(by_node)

    def end(self, fault: AzuError | None) -> None:
        """Answer the callers of the job, when no choice is open."""
        is_cut_off = self.reason is FinishReason.CANCELLED and not self.cancelled
        error = self.error or (fault if is_cut_off else None)
        run = JobRun(
            completion_tokens=self.delivered,
            finish_reason=FinishReason.ERROR if error else self.reason,
            error=error,
            prompt_tokens_ran=self.prompt_tokens_ran,
        )
        self.ended.set_result(run)


class JobRunner:
    """Jobs in, tokens to Redis; each choice of a job is a sequence of `engine`.

    `on_change` is called when the engine may have another step to send. `ask_expert_sets` returns when the
    engine has compared all work so far with what expert sets say of it.
    """

    def __init__(
        self,
        engine: EnginePipeline,
        jobs: RedisJobs,
        text: TextDecoder,
        metrics: PipelineMetrics,
        on_change: Callable[[], None],
        ask_expert_sets: Callable[[], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._jobs = jobs
        self._text = text
        self._metrics = metrics
        self._on_change = on_change
        self._ask_expert_sets = ask_expert_sets
        self._sequence_ids = itertools.count(1)
        self._canary = Canary(engine, self._sequence_ids, on_change)
        self._by_sequence: dict[int, tuple[_ActiveJob, int]] = {}  # with the choice that the sequence is
        self._by_job: OrderedDict[str, _ActiveJob] = OrderedDict()  # with those that ended lately
        self._events: asyncio.Queue[dict[int, TokenEvent]] = asyncio.Queue()  # by sequence id
        self._taken: deque[tuple[int, str, TokenEvent]] = deque()  # with the job, until they are written
        self._num_taken = 0  # steps whose tokens are being written
        self._fault: AzuError | None = None

    @property
    def takes_tokens(self) -> bool:
        """Whether another step may be sent: `fail` did not end everything, and Redis takes the tokens."""
        return self._fault is None and self._events.qsize() + self._num_taken < _MAX_UNWRITTEN_STEPS

    @property
    def job_ids(self) -> frozenset[str]:
        """The jobs that have not ended."""
        return frozenset(job_id for job_id, one in self._by_job.items() if not one.ended.done())

    async def run(self, job: Job) -> JobRun:
        """Run a job from what is written of it to its end; its tokens are in Redis when this returns.

        A second call for a job that runs here, or ended here lately, gets the same answer; a job whose client
        left and came back goes on.
        """
        active = self._by_job.get(job.job_id)
        if active is None or await self._goes_on(active):
            active = _ActiveJob(job, asyncio.get_running_loop().create_future())
            self._by_job[job.job_id] = active
            self._by_job.move_to_end(job.job_id)
            await self._begin(active)
        run = await asyncio.shield(active.ended)
        # The user has all tokens already.
        await self._ask_expert_sets()
        for sequence_id in active.sequences:
            active.count(self._engine.taken_back(sequence_id))
        return replace(run, work={layer: dict(by_node) for layer, by_node in active.work.items()})

    async def _goes_on(self, active: _ActiveJob) -> bool:
        """Say whether a job ended here as cancelled and is not cancelled any more."""
        if not active.ended.done() or not active.cancelled:
            return False
        return not (await retry_until_available(partial(self._jobs.progress, active.job))).cancelled

    async def canary(self) -> CanaryAnswer:
        """Continue the canary's prompts beside the jobs; raises an AzuError when that fails."""
        prompts = [self._text.prompt_ids(text) for text in CANARY_TEXTS]
        return await self._canary.ask([prompt for prompt in prompts if self._engine.takes(prompt)])

    def cancel(self, job_id: str) -> None:
        """End a job's sequences within one step; what was delivered stays delivered."""
        if active := self._by_job.get(job_id):
            active.cancelled = True
            self._cancel_open(active)
            self._on_change()

    def end(self, job_id: str, error: AzuError) -> None:
        """End a job's sequences with what was delivered, and this error."""
        if active := self._by_job.get(job_id):
            self._fail(active, error)

    @property
    def under_way(self) -> Mapping[ChoiceKey, int]:
        """How many tokens ran of each choice that had a step in flight when the engine was suspended."""
        found = {}
        for sequence_id, num_ran in self._engine.struck.items():
            if sequence_id in self._by_sequence:
                active, choice = self._by_sequence[sequence_id]
                found[active.job.job_id, choice] = num_ran
        return found

    def look(self, step_s: float) -> PipelineLook:
        """Return what the jobs do; `step_s` is what the last steps took."""
        moved = {job_id: self._by_job[job_id].delivered for job_id in self.job_ids}
        have_room, wait = set[str](), set[str]()
        for sequence_id, (number, has_room) in self._engine.positions.items():
            job_id = self._by_sequence[sequence_id][0].job.job_id
            moved[job_id] = moved.get(job_id, 0) + number
            (have_room if has_room else wait).add(job_id)
        # A job without any sequence in the engine waits for nothing: it has to come to its end.
        no_room = frozenset(wait - have_room)
        return PipelineLook(self._engine.num_returned, step_s, moved, no_room, phases=self._phases(have_room))

    def _phases(self, have_room: Collection[str]) -> dict[str, JobPhase]:
        """Return the phases of the jobs that wait or have no token."""
        waiting = dict.fromkeys(self._by_sequence[one][0].job.job_id for one in self._engine.queue)
        in_order = [job_id for job_id in waiting if job_id not in have_room]
        phases = {job_id: queued(ahead) for ahead, job_id in enumerate(in_order)}
        for sequence_id, (done, total) in self._engine.prompts.items():
            active, _ = self._by_sequence[sequence_id]
            if not active.delivered:
                phases.setdefault(active.job.job_id, reading(done, total))
        return phases

    def sequences_of(self, choices: Collection[ChoiceKey]) -> list[int]:
        """Return the sequences of some choices, as far as they have not ended."""
        return [
            sequence_id
            for sequence_id, (active, choice) in self._by_sequence.items()
            if (active.job.job_id, choice) in choices
        ]

    def complete(self, result: StepResult) -> None:
        """Take the last stage's tokens; a sequence that failed ends its job, with the error."""
        events = self._canary.take(self._engine.complete(result))
        # The next step leaves before the tokens of this one are written.
        self._on_change()
        self._events.put_nowait(events)
        for sequence_id, event in events.items():
            if event.error is not None:
                self._fail(self._by_sequence[sequence_id][0], event.error)

    def fail(self, error: AzuError) -> None:
        """End every job with what was delivered, and this error."""
        self._fault = error
        self._engine.suspend()
        self._canary.fail(error)
        for sequence_id in self._by_sequence:
            self._events.put_nowait(self._engine.cancel(sequence_id))

    async def write(self) -> None:
        """Wait for tokens of finished steps, and write those of all that have finished to Redis.

        A call that follows one that raised goes on with what that one had taken.
        """
        if not self._taken:
            self._take(await self._events.get())
        while not self._events.empty():
            self._take(self._events.get_nowait())
        written = [(job_id, event) for _, job_id, event in self._taken if event.token_ids]
        refused = await retry_until_available(partial(self._jobs.append, written))
        for job_id in refused:
            await self._begin_again(self._by_job[job_id])
        while self._taken:
            sequence_id, _, event = self._taken[0]
            if event.finish_reason is not None and sequence_id in self._by_sequence:
                self._end_sequence(sequence_id, event.finish_reason, event)
            self._taken.popleft()
        self._num_taken = 0
        # The engine may have waited for these tokens to be written.
        self._on_change()

    def _take(self, events: Mapping[int, TokenEvent]) -> None:
        self._num_taken += 1
        # A step may have been on its way when its job began again.
        known = [one for one in events.items() if one[0] in self._by_sequence]
        self._taken += [(sequence_id, *self._of_job(sequence_id, event)) for sequence_id, event in known]
        self._metrics.record_tokens(known, time.monotonic())

    async def _begin_again(self, active: _ActiveJob) -> None:
        """Have a job go on from what is written of it: Redis lost a part of that."""
        log.warning("begins again: tokens that were written are lost", extra={"job_id": active.job.job_id})
        for sequence_id in active.open:
            self._metrics.record_tokens([*self._engine.cancel(sequence_id).items()], time.monotonic())
            del self._by_sequence[sequence_id]
        active.open.clear()
        active.sequences.clear()
        active.work.clear()
        active.reason = FinishReason.STOP
        await self._begin(active)

    def _fail(self, active: _ActiveJob, error: AzuError) -> None:
        active.error = active.error or error
        self._cancel_open(active)

    def _cancel_open(self, active: _ActiveJob) -> None:
        for sequence_id in active.open:
            self._events.put_nowait(self._engine.cancel(sequence_id))

    async def _begin(self, active: _ActiveJob) -> None:
        try:
            await self._begin_choices(active)
        except Exception as error:
            del self._by_job[active.job.job_id]
            for sequence_id in active.open:
                self._engine.cancel(sequence_id)
                del self._by_sequence[sequence_id]
            active.ended.set_exception(error)

    async def _begin_choices(self, active: _ActiveJob) -> None:
        job = active.job
        known = await retry_until_available(partial(self._jobs.progress, job))
        active.delivered = known.delivered
        active.cancelled |= known.cancelled
        for choice, so_far in enumerate(known.choices):
            if so_far.finish_reason is not None:
                active.end_choice(so_far.finish_reason, so_far.work)
                continue
            if self._fault is None and not active.cancelled and active.error is None:
                try:
                    self._begin_choice(active, choice, so_far.token_ids)
                    continue
                except AzuError:
                    raise
                except Exception as error:
                    with log_context(job_id=job.job_id):
                        self._fail(active, as_known_error(error, "the search for stop strings"))
            work = self._engine.presumed_work(len(job.prompt_token_ids), len(so_far.token_ids))
            active.end_choice(FinishReason.CANCELLED, work)
        self._end_if_over(active)
        self._on_change()

    def _begin_choice(self, active: _ActiveJob, choice: int, generated: tuple[int, ...]) -> None:
        job = active.job
        sampling = replace(job.sampling, seed=_seed(job.sampling.seed, choice))
        text = self._text.completion(job.prompt_token_ids, sampling) if sampling.stop else None
        sequence = Sequence(
            next(self._sequence_ids),
            job.prompt_token_ids,
            sampling,
            generated,
            text.ends_with if text else None,
        )
        self._engine.add(sequence)
        self._metrics.record_start(sequence.sequence_id, len(job.prompt_token_ids), time.monotonic())
        self._by_sequence[sequence.sequence_id] = (active, choice)
        active.open.add(sequence.sequence_id)
        active.sequences.append(sequence.sequence_id)
        log.info("began", extra={"job_id": job.job_id, "sequence_id": sequence.sequence_id})

    def _of_job(self, sequence_id: int, event: TokenEvent) -> tuple[str, TokenEvent]:
        """Return a sequence's event with its index and choice in the job, and the job's id."""
        active, choice = self._by_sequence[sequence_id]
        event = replace(event, index=active.delivered, choice=choice)
        active.delivered += len(event.token_ids)
        return active.job.job_id, event

    def _end_sequence(self, sequence_id: int, reason: FinishReason, last: TokenEvent) -> None:
        active, _ = self._by_sequence.pop(sequence_id)
        active.open.remove(sequence_id)
        ids = {"job_id": active.job.job_id, "sequence_id": sequence_id}
        log.info("ended", extra=ids | {"finish_reason": reason.value})
        active.end_choice(reason, last.work, last.prompt_tokens_ran)
        self._end_if_over(active)

    def _end_if_over(self, active: _ActiveJob) -> None:
        if active.open:
            return
        active.end(self._fault)
        # The prompt may be long, and a scheduler that asks again needs only the outcome.
        active.job = replace(active.job, prompt_token_ids=())
        self._by_job.move_to_end(active.job.job_id)
        ended = [job_id for job_id, one in self._by_job.items() if one.ended.done()]
        for job_id in ended[:-_KEPT_JOBS]:
            del self._by_job[job_id]


def _seed(seed: int, choice: int) -> int:
    """Return a choice's seed. The first is what the job would get if it asked for one.

    The others are hashed: a sum would make the second choice of a seed the first choice of the next seed.
    """
    return xxhash.xxh3_64_intdigest(_SEED.pack(seed % _SEED_RANGE, choice)) % _SEED_RANGE if choice else seed
