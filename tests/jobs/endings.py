"""An outcome for tests that do not examine its receipt, and the tokens that led to it."""

from azu.jobs.redis import RedisJobs
from azu.protocol.job import FinishReason, JobOutcome, JobState, Receipt
from tests.builders import ALICE

_MOST_CHOICES = 8


def outcome(
    job_id: str = "job-1",
    *,
    state: JobState = JobState.DONE,
    finish_reason: FinishReason = FinishReason.STOP,
    completion_tokens: int = 2,
) -> JobOutcome:
    """Return an outcome with a fixed receipt."""
    receipt = Receipt(
        job_id=job_id,
        address=ALICE,
        model_id="test/model",
        revision="r1",
        prompt_tokens=4,
        completion_tokens=completion_tokens,
        num_layers=4,
        lamports_per_token_layer=2,
        charged_lamports=48,
        released_lamports=64,
        platform_lamports=10,
        worker_lamports={ALICE: 38},
        transfer_id=f"settle:{job_id}",
    )
    return JobOutcome(state, finish_reason, receipt)


async def tokens(jobs: RedisJobs, job_id: str, choice: int = 0) -> tuple[int, ...]:
    """Return the tokens of one choice that are written."""
    return (await jobs.tokens(job_id, _MOST_CHOICES))[choice]
