"""The end of a job: charge the delivered tokens, pay the workers, release the rest, write the outcome.

Every job ends. What a run says of work decides only who gets the workers' part of the charge, and what the
books refuse three times ends without them.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from azu.addresses import ADDRESS_PATTERN
from azu.errors import AzuError, LedgerError, TransferConflict
from azu.jobs.record import JobRecord
from azu.jobs.redis import RedisJobs
from azu.money.books import Books
from azu.money.pricing import charge, charged_prompt, divide
from azu.protocol.job import FinishReason, Job, JobOutcome, JobRun, JobState, Receipt
from azu.supervision import AWAY

log = logging.getLogger(__name__)

_ADDRESS = re.compile(ADDRESS_PATTERN)

_STATES = {FinishReason.ERROR: JobState.FAILED, FinishReason.CANCELLED: JobState.CANCELLED}


class Settlement:
    """Ends jobs: one transfer under the job's id, one receipt, one outcome."""

    def __init__(
        self, books: Books, jobs: RedisJobs, lamports_per_token_layer: int, platform_percent: int
    ) -> None:
        self._books = books
        self._jobs = jobs
        self._price = lamports_per_token_layer
        self._platform_percent = platform_percent

    async def give_up(self, record: JobRecord, error: AzuError) -> None:
        """End a job whose end failed again and again, with an error, whatever the books say to it.

        Its delivered tokens are charged, and the workers' part is held. Where the books refuse that too, all
        is released; where its reservation has ended before, the job ends as planned.
        """
        job = record.job
        delivered = JobRun(await self._jobs.delivered(job.job_id), FinishReason.ERROR, error=error)
        nothing = replace(delivered, completion_tokens=0)
        for outcome in (self._outcome(job, delivered), self._outcome(job, nothing)):
            try:
                await self._books.settle(outcome.receipt)
                break
            except AWAY:
                raise
            except Exception as refused:
                log.error("the books refuse this end: %s", refused, extra={"job_id": job.job_id})
                has_ended = isinstance(refused, LedgerError) and refused.code == "hold_ended"
                if has_ended or isinstance(refused, TransferConflict):
                    outcome = record.ending or outcome  # noqa: PLW2901 - the books have ended it so
                    break
        await self._jobs.finish(job.job_id, outcome)

    async def settle(self, job: Job, run: JobRun) -> JobOutcome:
        """End a job: charge the delivered tokens or release the whole reservation, then write the outcome.

        The tokens in the job's stream are charged, however many the run says there are. The outcome is fixed
        first: a scheduler that takes the job after a crash may run it again with another result, and ends
        the job with the outcome that was fixed before.
        """
        run = replace(run, completion_tokens=await self._jobs.delivered(job.job_id))
        outcome = await self._jobs.plan_end(job.job_id, self._outcome(job, run))
        await self.conclude(job, outcome)
        return outcome

    async def conclude(self, job: Job, ending: JobOutcome) -> None:
        """Apply the transfer of a fixed outcome and write it; a second call changes nothing."""
        await self._books.settle(ending.receipt)
        await self._jobs.finish(job.job_id, ending)

    def _outcome(self, job: Job, run: JobRun) -> JobOutcome:
        return JobOutcome(
            state=_STATES.get(run.finish_reason, JobState.DONE),
            finish_reason=run.finish_reason,
            receipt=self._receipt(job, run),
            error=run.error.to_openai()["error"] if run.error else None,
        )

    def _receipt(self, job: Job, run: JobRun) -> Receipt:
        num_prompt = len(job.prompt_token_ids)
        # A pipeline may have written more than was asked for, and no job costs more than it reserved.
        delivered = min(run.completion_tokens, job.choices * job.sampling.max_tokens)
        # What azu ends before the first token costs nothing, whatever ran.
        ran = run.prompt_tokens_ran if run.finish_reason is FinishReason.CANCELLED else 0
        charged = charge(num_prompt, delivered, job.num_layers, self._price, ran)
        division = divide(charged, self._platform_percent, run.work, job.num_layers)
        workers, unowned = _by_payout(division.workers, run.payout_by_node)
        return Receipt(
            job_id=job.job_id,
            address=job.address,
            model_id=job.model_id,
            revision=job.revision,
            prompt_tokens=charged_prompt(num_prompt, delivered, ran),
            completion_tokens=delivered,
            num_layers=job.num_layers,
            lamports_per_token_layer=self._price,
            charged_lamports=charged,
            released_lamports=job.reserved_lamports - charged,
            platform_lamports=division.platform_lamports,
            held_lamports=division.held_lamports + unowned,
            worker_lamports=workers,
            transfer_id=_transfer_id(job, charged),
            topology=run.placements,
        )


def _transfer_id(job: Job, charged: int) -> str:
    return f"{'settle' if charged else 'release'}:{job.job_id}"


def _by_payout(by_node: Mapping[str, int], payout_by_node: Mapping[str, str]) -> tuple[dict[str, int], int]:
    """Return shares by payout address, and the lamports of nodes that have none."""
    shares, unowned = Counter[str](), 0
    for node_id, lamports in by_node.items():
        payout = payout_by_node.get(node_id, "")
        if _ADDRESS.fullmatch(payout):
            shares[payout] += lamports
        else:
            unowned += lamports
    return dict(shares), unowned
