"""Receipts of ended jobs, signed by the platform's key."""

from typing import Any

from fastapi import APIRouter

from azu.auth.receipts import sealed
from azu.errors import Conflict
from deployments.accounts import Key, ServicesNow
from deployments.jobs import owned

router = APIRouter()

# Signing takes the treasury a moment; while it is away a receipt is handed out unsigned.
_SIGNATURE_TIMEOUT_S = 5.0


@router.get("/v1/receipts/{job_id}")
async def receipt(job_id: str, key: Key, services: ServicesNow) -> dict[str, Any]:
    """Return what a job cost, who ran what and earned what; `signature` is null while nobody can sign."""
    record = await owned(services, key, job_id)
    if record.outcome is None:
        raise Conflict(f"{job_id} has not ended", code="job_not_finished")
    signature = await services.receipts.ask(job_id, _SIGNATURE_TIMEOUT_S)
    return sealed(record.outcome.receipt, services.config.platform_address, signature)
