"""What a prompt would cost, and how fast it would be answered, before it is sent."""

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from azu.errors import InvalidRequest
from azu.protocol.job import JobState
from azu.protocol.topology import Prediction
from deployments.accounts import Key, ServicesNow
from deployments.messages import Text
from deployments.services import Services

router = APIRouter()

# So many of the caller's latest jobs say how long an answer is expected to be.
_JOBS_LOOKED_AT = 50


class QuoteRequest(BaseModel):
    """POST /v1/quote: a prompt as it is, or the number of its tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text = Field(min_length=1, max_length=256)
    prompt: Text | None = Field(default=None, min_length=1)
    tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)


@router.post("/v1/quote")
async def quote(body: QuoteRequest, key: Key, services: ServicesNow) -> dict[str, Any]:
    """Return the highest and the expected price; `prediction` is null for a model that is not deployed."""
    if (body.prompt is None) == (body.tokens is None):
        raise InvalidRequest("give either the prompt or the number of its tokens", param="prompt")
    model = await services.model(body.model)
    num_tokens = body.tokens or 0
    if body.prompt is not None:
        num_tokens = len(await asyncio.to_thread(model.tokenizer.encode, body.prompt))
    max_tokens = body.max_tokens or services.intake.completion_limit(model.facts, num_tokens)
    expected_tokens = await _usual_tokens(services, key.address, model.facts.model_id)
    quoted = services.intake.quote(model.facts, num_tokens, max_tokens, expected_tokens)
    prediction: Prediction | None = await services.scheduler(
        "prediction", model.facts.model_id, model.facts.revision
    )
    return {
        "model": body.model,
        "num_layers": model.facts.num_layers,
        **asdict(quoted),
        "prediction": None if prediction is None else asdict(prediction),
    }


async def _usual_tokens(services: Services, address: str, model_id: str) -> int | None:
    """Return the average length of the address's latest answers of a model; None if it had none."""
    lengths = [
        record.outcome.receipt.completion_tokens
        for record in await services.jobs.of(address, _JOBS_LOOKED_AT)
        if record.job.model_id == model_id and record.outcome and record.state is JobState.DONE
    ]
    return round(sum(lengths) / len(lengths)) if lengths else None
