"""The end of a job: the books charge its delivered tokens and share them out; then the outcome is written.

Every job ends. What the books say of its end is the truth: a job that they have ended before ends as it did
then.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress

from azu.errors import AzuError, LedgerError, NotFound, Unavailable
from azu.jobs.redis import RedisJobs
from azu.money.books import Books
from azu.money.pricing import charged_prompt
from azu.protocol.job import FinishReason, Job, JobEnding, JobOutcome, JobRun, JobState, Receipt
from azu.supervision import AWAY, as_known_error

log = logging.getLogger(__name__)

_STATES = {FinishReason.ERROR: JobState.FAILED, FinishReason.CANCELLED: JobState.CANCELLED}
_LOST = Unavailable("Redis lost the job with its last writes", code="job_lost")


class Settlement:
    """Ends jobs: one entry of the ledger, one receipt, one outcome.

    `earned` is called with the lamports that each payout address gets of a job.
    """

    def __init__(
        self, books: Books, jobs: RedisJobs, earned: Callable[[Mapping[str, int]], None] = lambda _: None
    ) -> None:
        self._books = books
        self._jobs = jobs
        self._earned = earned

    async def settle(self, job: Job, run: JobRun) -> JobOutcome:
        """End a job: charge the delivered tokens or release the whole reservation, then write the outcome.

        The tokens in the job's stream are charged, however many the run says there are.
        """
        delivered = await self._jobs.delivered(job.job_id)
        # What azu ends before the first token costs nothing, whatever ran.
        ran = run.prompt_tokens_ran if run.finish_reason is FinishReason.CANCELLED else 0
        outcome = await self._books.settle(
            job.job_id,
            prompt_tokens=charged_prompt(len(job.prompt_token_ids), delivered, ran),
            completion_tokens=delivered,
            work=run.work,
            ending=_ending(run),
        )
        await self._jobs.finish(job.job_id, outcome)
        self._earned(outcome.receipt.worker_lamports)
        return outcome

    async def take_back(self, job: Job) -> bool:
        """End a job as the books ended it before; return False if they did not, or tokens of it are missing.

        Tokens that were charged and lost are computed again, without another charge.
        """
        outcome = await self._books.ended(job.job_id)
        if outcome is None or await self._jobs.delivered(job.job_id) < outcome.receipt.completion_tokens:
            return False
        await self._jobs.finish(job.job_id, outcome)
        return True

    async def lose(self, job: Job) -> None:
        """Release what is reserved for a job whose record is lost, unless the books have ended the job."""
        nothing = JobRun(completion_tokens=0, finish_reason=FinishReason.ERROR, error=_LOST)
        with suppress(LedgerError):  # nothing was reserved: the books lost it too
            await self._books.settle(
                job.job_id, prompt_tokens=0, completion_tokens=0, work={}, ending=_ending(nothing)
            )

    async def give_up(self, job: Job, error: AzuError) -> None:
        """End a job whose end failed again and again, with an error, whatever the books say to it.

        Its delivered tokens are charged, and the workers' part is held.
        """
        failed = JobRun(completion_tokens=0, finish_reason=FinishReason.ERROR, error=error)
        try:
            await self.settle(job, failed)
        except (*AWAY, NotFound):
            raise
        except Exception as refused:
            log.error("the books refuse this end", exc_info=refused, extra={"job_id": job.job_id})
            await self._jobs.finish(job.job_id, _unbooked(job, failed))

    async def give_back(self) -> None:
        """Return what is still reserved of jobs that are lost, or ended against the books, once overdue.

        A job whose record cannot be read has ended.
        """
        for job_id in await self._books.overdue():
            try:
                # First the job, then its money: a job that is written meanwhile keeps its reservation.
                if await self._has_ended(job_id) or await self._jobs.give_up(job_id):
                    await self._books.expire(job_id)
                    log.warning("gave back what was reserved for a lost job", extra={"job_id": job_id})
            except AWAY:
                raise
            except Exception as error:
                known = as_known_error(error, f"the give-back of {job_id}")
                log.error("%s keeps its reservation: %s", job_id, known.message)

    async def _has_ended(self, job_id: str) -> bool:
        try:
            record = await self._jobs.get(job_id)
        except AWAY:
            raise
        except Exception as error:
            as_known_error(error, f"the record of {job_id}")
            return True  # no scheduler can take it up
        return record is not None and record.outcome is not None


def _ending(run: JobRun) -> JobEnding:
    return JobEnding(
        state=_STATES.get(run.finish_reason, JobState.DONE),
        finish_reason=run.finish_reason,
        error=run.error.to_openai()["error"] if run.error else None,
        topology=run.placements,
    )


def _unbooked(job: Job, run: JobRun) -> JobOutcome:
    """Return the outcome of a job that the books know nothing of: no money moves."""
    ending = _ending(run)
    receipt = Receipt(
        job_id=job.job_id,
        address=job.address,
        model_id=job.model_id,
        revision=job.revision,
        prompt_tokens=0,
        completion_tokens=0,
        num_layers=job.num_layers,
        lamports_per_token_layer=0,
        charged_lamports=0,
        released_lamports=0,
        platform_lamports=0,
        worker_lamports={},
        transfer_id="",
    )
    return JobOutcome(ending.state, ending.finish_reason, receipt, ending.error)
