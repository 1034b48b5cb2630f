"""The end of a job: charge the delivered tokens, pay the workers, release the rest, write the outcome."""

from collections.abc import Mapping

from azu.errors import AzuError, LedgerError
from azu.jobs.record import JobRecord
from azu.jobs.redis import RedisJobs
from azu.money.books import Books
from azu.money.pricing import charge, divide
from azu.protocol.job import FinishReason, Job, JobOutcome, JobRun, JobState, Receipt

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
        """End a job that cannot be settled, with an error; its whole reservation is released.

        Only where its planned end was settled before does the job end as planned.
        """
        job = record.job
        nothing = JobRun(completion_tokens=0, finish_reason=FinishReason.ERROR, error=error)
        outcome = self._outcome(job, nothing)
        try:
            await self._books.settle(outcome.receipt)
        except LedgerError as refused:
            if refused.code != "hold_ended":
                raise
            outcome = record.ending or outcome
        await self._jobs.finish(job.job_id, outcome)

    async def settle(self, job: Job, run: JobRun) -> JobOutcome:
        """End a job: charge the delivered tokens or release the whole reservation, then write the outcome.

        The outcome is fixed first. A scheduler that takes the job after a crash may run it again with another
        result; it ends the job with the outcome that was fixed before.
        """
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
        # A job without a delivered token costs nothing, its prompt included.
        prompt_tokens = len(job.prompt_token_ids) if run.completion_tokens else 0
        charged = charge(prompt_tokens, run.completion_tokens, job.num_layers, self._price)
        division = divide(
            charged, self._platform_percent, _by_payout(run.work, run.payout_by_node), job.num_layers
        )
        return Receipt(
            job_id=job.job_id,
            address=job.address,
            model_id=job.model_id,
            revision=job.revision,
            prompt_tokens=len(job.prompt_token_ids),
            completion_tokens=run.completion_tokens,
            num_layers=job.num_layers,
            lamports_per_token_layer=self._price,
            charged_lamports=charged,
            released_lamports=job.reserved_lamports - charged,
            platform_lamports=division.platform_lamports,
            worker_lamports=division.workers,
            transfer_id=_transfer_id(job, charged),
            topology=run.placements,
        )


def _transfer_id(job: Job, charged: int) -> str:
    return f"{'settle' if charged else 'release'}:{job.job_id}"


def _by_payout(
    work: Mapping[int, Mapping[str, int]], payout_by_node: Mapping[str, str]
) -> dict[int, dict[str, int]]:
    """Return work keyed by payout address; the nodes of one owner are added up."""
    merged: dict[int, dict[str, int]] = {}
    for layer, by_node in work.items():
        shares = merged.setdefault(layer, {})
        for node_id, activated in by_node.items():
            payout = payout_by_node[node_id]
            shares[payout] = shares.get(payout, 0) + activated
    return merged
