"""Jobs by id: submit a prompt, ask for its results, price and receipt."""

import asyncio
import logging
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Query

from azu.api.jobs import (
    ChoiceResult,
    DeletedJob,
    DisputeRequest,
    DisputeState,
    JobLine,
    JobList,
    QuoteRequest,
    QuoteResponse,
    Results,
    SubmitRequest,
    SubmittedJob,
)
from azu.api.openai import CompletionRequest
from azu.api.receipts import ReceiptLines, SignedReceipt
from azu.auth.signatures import receipt_facts, sealed
from azu.clock import wall_clock_ms
from azu.errors import AzuError, Conflict, InvalidRequest
from azu.jobs.record import JobRecord
from azu.protocol.job import JobState
from azu.protocol.topology import Prediction
from deployments.answers import phase_line, usage_of
from deployments.sampling import check_choices, check_max_tokens, check_prompt_tokens, sampling_params
from deployments.services import Bearer, Key, ServedModel, Services, ServicesNow, check_speaks_for, owned

log = logging.getLogger(__name__)

router = APIRouter()


@router.post("/submit")
async def submit(body: SubmitRequest, key: Key, bearer: Bearer, services: ServicesNow) -> SubmittedJob:
    """Queue a prompt as it is, with the model's own sampling defaults.

    For a model that is new here a fee is set aside.
    """
    check_speaks_for(key, body.user_address)
    check_max_tokens(body.est_tokens, services.config.policy.limits)
    model = await services.model(body.model_id, bearer)
    prompt = await services.encode(model, body.prompt)
    request = CompletionRequest(model=body.model_id, prompt=body.prompt, max_tokens=body.est_tokens)
    sampling = sampling_params(request, model.defaults, model.vocab_size, default_max_tokens=body.est_tokens)
    accepting = asyncio.create_task(services.intake.accept(key, bearer, model.facts, tuple(prompt), sampling))
    try:
        job = await asyncio.shield(accepting)
    except asyncio.CancelledError:
        # A caller that hangs up leaves no reservation without its job.
        await accepting
        raise
    return SubmittedJob(job_id=job.job_id)


@router.get("/results/{job_id}")
async def results(job_id: str, key: Key, services: ServicesNow, afterwards: BackgroundTasks) -> Results:
    """Return a job's state and what it has produced so far; nothing once its answer is not kept any more."""
    record = await owned(services, key, job_id)
    tokens = await services.jobs.tokens(job_id, record.job.choices)
    model = None
    if any(tokens):
        try:
            model = await services.model(record.job.model_id)
        except AzuError as error:
            if record.outcome is None:
                raise
            log.warning("an answer of %s is shown without its text: %s", record.job.model_id, error.message)
    # A long answer takes seconds, in which the other callers' answers go on.
    choices = await asyncio.to_thread(lambda: [_choice(model, record, token_ids) for token_ids in tokens])
    outcome = record.outcome
    if outcome is not None and not record.asked:
        afterwards.add_task(services.jobs.note_read, job_id)
    receipt = outcome.receipt if outcome else None
    prompt_tokens = receipt.prompt_tokens if receipt else len(record.job.prompt_token_ids)
    completion_tokens = sum(len(choice.token_ids) for choice in choices)
    return Results(
        job_id=job_id,
        status=record.state.value,
        phase=phase_line(record.phase),
        text=choices[0].text,
        token_ids=choices[0].token_ids,
        choices=tuple(choices),
        finish_reason=outcome.finish_reason.value if outcome else None,
        usage=usage_of(prompt_tokens, completion_tokens, receipt),
        receipt=ReceiptLines.model_validate(receipt_facts(receipt)) if receipt else None,
        error=outcome.error if outcome else None,
    )


@router.get("/v1/jobs")
async def jobs(
    key: Key,
    services: ServicesNow,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    before: Annotated[str, Query(max_length=100)] = "",
) -> JobList:
    """Return the caller's jobs, newest first, or those that came before the job `before`."""
    return JobList(data=tuple(map(_line, await services.jobs.of(key.address, limit, before))))


@router.get("/v1/jobs/{job_id}")
async def job(job_id: str, key: Key, services: ServicesNow) -> JobLine:
    """Return where a job stands, and what it cost once it has ended."""
    return _line(await owned(services, key, job_id))


@router.post("/v1/jobs/{job_id}/cancel")
async def cancel(job_id: str, key: Key, services: ServicesNow) -> JobLine:
    """End a job soon; what was delivered is charged, and before the first token the prompt tokens that ran.

    A job that has ended stays as it is.
    """
    await owned(services, key, job_id)
    await services.jobs.cancel(job_id, client_left=True)
    return _line(await owned(services, key, job_id))


@router.post("/v1/jobs/{job_id}/dispute")
async def dispute(job_id: str, body: DisputeRequest, key: Key, services: ServicesNow) -> DisputeState:
    """Have what a job paid out be held until the network's admin decides, before it has matured.

    The same dispute again gets the same answer.
    """
    held = await services.books.dispute(key.address, job_id, body.signature)
    return DisputeState(job_id=job_id, held_lamports=held.lamports)


@router.get("/v1/jobs/{job_id}/dispute")
async def decision(job_id: str, key: Key, services: ServicesNow) -> DisputeState:
    """Return whether a job is disputed, and what the network's admin decided about it."""
    await owned(services, key, job_id)
    found = await services.books.decision(job_id)
    is_back = found.state == "reversed"
    return DisputeState(
        job_id=job_id,
        state=found.state,
        held_lamports=0 if is_back else found.lamports,
        returned_lamports=found.lamports if is_back else 0,
    )


@router.delete("/v1/jobs/{job_id}")
async def delete(job_id: str, key: Key, services: ServicesNow) -> DeletedJob:
    """Remove an ended job's prompt and answer; its receipt stays. They leave the disk within an hour."""
    await owned(services, key, job_id)
    await services.jobs.remove(job_id, wall_clock_ms())
    return DeletedJob(deleted=job_id)


def _choice(model: ServedModel | None, record: JobRecord, token_ids: tuple[int, ...]) -> ChoiceResult:
    if model is None:
        return ChoiceResult(text="", token_ids=token_ids)
    text = model.tokenizer.completion(record.job.prompt_token_ids, record.job.sampling)
    shown = [text.push(token_id).text for token_id in token_ids]
    if record.outcome is not None:
        shown.append(text.finish().text)
    return ChoiceResult(text="".join(shown), token_ids=token_ids)


def _line(record: JobRecord) -> JobLine:
    job, outcome = record.job, record.outcome
    receipt = outcome.receipt if outcome else None
    ended = record.state not in (JobState.QUEUED, JobState.RUNNING)
    return JobLine(
        job_id=job.job_id,
        model=job.model_id,
        status=record.state.value,
        phase=phase_line(record.phase),
        created_at_ms=job.created_at_ms,
        reserved_lamports=0 if ended else job.reserved_lamports,
        finish_reason=outcome.finish_reason.value if outcome else None,
        charged_lamports=receipt.charged_lamports if receipt else None,
        released_lamports=receipt.released_lamports if receipt else None,
        error=outcome.error if outcome else None,
        key_id=job.key_id,
        prompt_tokens=receipt.prompt_tokens if receipt else None,
        completion_tokens=receipt.completion_tokens if receipt else None,
    )


# An answer is expected to be as long as those of the caller's latest jobs, this many.
_LATEST_JOBS = 50


@router.post("/v1/quote")
async def quote(body: QuoteRequest, key: Key, bearer: Bearer, services: ServicesNow) -> QuoteResponse:
    """Return the highest and the expected price; `prediction` is null for a model that is not deployed.

    For a model that is new here a fee is set aside.
    """
    if [body.prompt, body.messages, body.tokens].count(None) != 2:
        raise InvalidRequest("give the prompt, the messages or the number of tokens", param="prompt")
    check_choices(body.n, services.config.policy.limits)
    check_max_tokens(body.max_tokens or 1, services.config.policy.limits)
    check_prompt_tokens(body.tokens or 0, services.config.policy.limits)
    model = await services.model(body.model, bearer)
    num_tokens = body.tokens or 0
    if body.prompt is not None:
        num_tokens = len(await services.encode(model, body.prompt))
    elif body.messages is not None:
        num_tokens = len(await services.render(model, body.messages))
    max_tokens = body.max_tokens or services.intake.completion_limit(model.facts, num_tokens)
    expected_tokens = await _usual_tokens(services, key.address, model.facts.model_id)
    quoted = await services.intake.quote(model.facts, num_tokens, max_tokens, expected_tokens, body.n)
    prediction: Prediction | None = await services.scheduler(
        "prediction", model.facts.model_id, model.facts.revision
    )
    return QuoteResponse(
        model=body.model, num_layers=model.facts.num_layers, prediction=prediction, **asdict(quoted)
    )


async def _usual_tokens(services: Services, address: str, model_id: str) -> int | None:
    """Return the average length of the address's latest answers of a model; None if it had none."""
    lengths = [
        record.outcome.receipt.completion_tokens
        for record in await services.jobs.of(address, _LATEST_JOBS)
        if record.job.model_id == model_id and record.outcome and record.state is JobState.DONE
    ]
    return round(sum(lengths) / len(lengths)) if lengths else None


@router.get("/v1/receipts/{job_id}")
async def receipt(job_id: str, key: Key, services: ServicesNow) -> SignedReceipt:
    """Return what a job cost, which nodes ran it and what each worker earned.

    `signature` is null while the ledger is not what it was, and before the platform has certified its key.
    """
    await owned(services, key, job_id)
    outcome = await services.books.ended(job_id)
    if outcome is None:
        raise Conflict(f"{job_id} has not ended", code="job_not_finished")
    signature = await services.books.receipt_signature(job_id)
    return SignedReceipt.model_validate(sealed(outcome.receipt, services.config.platform_address, signature))
