"""What the client returns: frozen values, read from the ingress's JSON."""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from azu.api.base import _LENIENT
from azu.api.network import PieceLine
from azu.api.openai import Text


@dataclass(frozen=True, slots=True)
class ReceiptLines:
    """A receipt as the ingress gives it."""

    __pydantic_config__ = _LENIENT

    job_id: str
    model_id: str
    prompt_tokens: int
    completion_tokens: int
    num_layers: int
    token_layers: int
    charged_lamports: int
    released_lamports: int
    platform_lamports: int
    worker_lamports: Mapping[str, int]
    transfer_id: str
    topology: tuple[PieceLine, ...]


@dataclass(frozen=True, slots=True)
class JobLine:
    """A job in a list."""

    __pydantic_config__ = _LENIENT

    job_id: str
    model: str
    status: str
    created_at_ms: int
    reserved_lamports: int
    finish_reason: str | None
    charged_lamports: int | None
    released_lamports: int | None
    error: Mapping[str, str | None] | None


@dataclass(frozen=True, slots=True)
class Results:
    """What a job has produced so far."""

    __pydantic_config__ = _LENIENT

    job_id: str
    status: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    error: Mapping[str, str | None] | None
    receipt: ReceiptLines | None = None


class SubmitRequest(BaseModel):
    """POST /submit: `est_tokens` is the most new tokens the caller pays for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user_address: str = Field(max_length=64)
    model_id: Text = Field(min_length=1, max_length=256)
    prompt: Text = Field(min_length=1)
    est_tokens: int = Field(ge=1)


class QuoteRequest(BaseModel):
    """POST /v1/quote: a prompt as it is, or the number of its tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text = Field(min_length=1, max_length=256)
    prompt: Text | None = Field(default=None, min_length=1)
    tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
