"""An outcome for tests that do not examine its receipt."""

from azu.protocol.job import FinishReason, JobOutcome, JobState, Receipt
from tests.builders import ALICE


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
