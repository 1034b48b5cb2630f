"""Jobs by id: submit now, ask for results later."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from pydantic import BaseModel, ConfigDict, Field

from azu.auth.keys import ApiKey
from azu.auth.receipts import receipt_facts
from azu.errors import Forbidden, NotFound
from azu.jobs.record import JobRecord
from azu.protocol.job import JobState
from deployments.accounts import Key, ServicesNow
from deployments.answers import usage
from deployments.messages import Text
from deployments.openai import CompletionRequest
from deployments.sampling import sampling_params
from deployments.services import ServedModel, Services

router = APIRouter()


class SubmitRequest(BaseModel):
    """POST /submit: `est_tokens` is the most new tokens the caller pays for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user_address: str = Field(max_length=64)
    model_id: Text = Field(min_length=1, max_length=256)
    prompt: Text = Field(min_length=1)
    est_tokens: int = Field(ge=1)


@router.post("/submit")
async def submit(
    body: SubmitRequest, services: ServicesNow, authorization: Annotated[str | None, Header()] = None
) -> dict[str, str]:
    """Queue a prompt as it is, with the model's own sampling defaults."""
    key = await services.owner(authorization, body.user_address)
    model = await services.model(body.model_id)
    prompt = await asyncio.to_thread(model.tokenizer.encode, body.prompt)
    request = CompletionRequest(model=body.model_id, prompt=body.prompt, max_tokens=body.est_tokens)
    sampling = sampling_params(request, model, default_max_tokens=body.est_tokens)
    job = await services.intake.accept(key, model.facts, tuple(prompt), sampling)
    return {"job_id": job.job_id}


@router.get("/results/{job_id}")
async def results(job_id: str, key: Key, services: ServicesNow) -> dict[str, Any]:
    """Return a job's state and what it has produced so far."""
    record = await owned(services, key, job_id)
    model = await services.model(record.job.model_id)
    choices = [
        _choice(model, record, await services.jobs.tokens(job_id, index))
        for index in range(record.job.choices)
    ]
    completion_tokens = sum(len(choice["token_ids"]) for choice in choices)
    outcome = record.outcome
    receipt = outcome.receipt if outcome else None
    return {
        "job_id": job_id,
        "status": record.state.value,
        **choices[0],
        "choices": choices,
        "finish_reason": outcome.finish_reason.value if outcome else None,
        "usage": usage(len(record.job.prompt_token_ids), completion_tokens, receipt),
        "receipt": receipt_facts(receipt) if receipt else None,
        "error": outcome.error if outcome else None,
    }


@router.get("/v1/jobs")
async def jobs(
    key: Key, services: ServicesNow, limit: Annotated[int, Query(ge=1, le=1000)] = 50
) -> dict[str, list[dict[str, Any]]]:
    """Return the caller's jobs, newest first."""
    return {"data": [_line(record) for record in await services.jobs.of(key.address, limit)]}


def _choice(model: ServedModel, record: JobRecord, token_ids: tuple[int, ...]) -> dict[str, Any]:
    text = model.tokenizer.completion(record.job.prompt_token_ids, record.job.sampling)
    shown = [text.push(token_id).text for token_id in token_ids]
    if record.outcome is not None:
        shown.append(text.finish().text)
    return {"text": "".join(shown), "token_ids": token_ids}


async def owned(services: Services, key: ApiKey, job_id: str) -> JobRecord:
    """Return a job of the key's address; raises NotFound, and Forbidden for another address's."""
    record = await services.jobs.get(job_id)
    if record is None:
        raise NotFound("there is no such job", param="job_id", code="job_not_found")
    if record.job.address != key.address:
        raise Forbidden("this job belongs to another address", param="job_id")
    return record


def _line(record: JobRecord) -> dict[str, Any]:
    outcome = record.outcome
    ended = record.state not in (JobState.QUEUED, JobState.RUNNING)
    return {
        "job_id": record.job.job_id,
        "model": record.job.model_id,
        "status": record.state.value,
        "created_at_ms": record.job.created_at_ms,
        "reserved_lamports": 0 if ended else record.job.reserved_lamports,
        "finish_reason": outcome.finish_reason.value if outcome else None,
        "charged_lamports": outcome.receipt.charged_lamports if outcome else None,
        "released_lamports": outcome.receipt.released_lamports if outcome else None,
        "error": outcome.error if outcome else None,
    }
