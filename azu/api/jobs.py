"""Jobs: submit one, ask for its results, and its price."""

from pydantic import Field

from azu.api.base import ErrorDetail, RequestModel, ResponseModel
from azu.api.openai import Message, Text, Usage
from azu.api.receipts import ReceiptLines
from azu.protocol.phase import PhaseName


class SubmitRequest(RequestModel):
    """POST /submit. `est_tokens` is the most new tokens that the caller pays for."""

    user_address: str = Field(max_length=64)
    model_id: Text = Field(min_length=1, max_length=256)
    prompt: Text = Field(min_length=1)
    est_tokens: int = Field(ge=1)


class SubmittedJob(ResponseModel):
    """The id of a job that is queued."""

    job_id: str


class Phase(ResponseModel):
    """Where a job stands that has not ended, with a sentence for people and what is counted in the phase.

    queued: `total` jobs come before it. fetching: `done` of `total` shards, or bytes alone while the network
    downloads and cuts the model. loading, recovering: parts of the model that are up. reading: prompt tokens.
    answering: completion tokens, of the most that may come. What is not counted is null.
    """

    name: PhaseName
    text: str
    done: int | None
    total: int | None
    bytes_done: int | None
    bytes_total: int | None


class ChoiceResult(ResponseModel):
    """What one choice of a job has produced so far."""

    text: str
    token_ids: tuple[int, ...]


class Results(ResponseModel):
    """What a job has produced so far; `text` and `token_ids` are those of the first choice.

    `status` is "queued", "running", "done", "failed" or "cancelled"; `phase` is null once the job has ended.
    """

    job_id: str
    status: str
    phase: Phase | None = None
    text: str
    token_ids: tuple[int, ...]
    choices: tuple[ChoiceResult, ...]
    finish_reason: str | None
    usage: Usage
    receipt: ReceiptLines | None
    error: ErrorDetail | None


class JobLine(ResponseModel):
    """A job without its texts. `reserved_lamports` is 0 and `phase` null once the job has ended.

    What is charged, and the tokens of that, are null before. `key_id` is the API key that asked for it.
    """

    job_id: str
    model: str
    status: str
    phase: Phase | None = None
    created_at_ms: int
    reserved_lamports: int
    finish_reason: str | None
    charged_lamports: int | None
    released_lamports: int | None
    error: ErrorDetail | None
    key_id: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class JobList(ResponseModel):
    """Jobs of one address, newest first."""

    data: tuple[JobLine, ...]


class DisputeRequest(RequestModel):
    """POST /v1/jobs/{job_id}/dispute. `signature` is the EIP-712 signature of the address that paid."""

    signature: str = Field(max_length=256)


class DisputeState(ResponseModel):
    """What became of what a job paid out, beside its receipt.

    `state` is "none", "held" while a dispute waits for the network's admin, "dismissed", or "reversed" once
    `returned_lamports` went back to the payer.
    """

    job_id: str
    held_lamports: int
    state: str = "held"
    returned_lamports: int = 0


class DeletedJob(ResponseModel):
    """The id of a job whose prompt and answer are removed."""

    deleted: str


class QuoteRequest(RequestModel):
    """POST /v1/quote: a prompt as it is, a chat's messages, or the number of its tokens; for `n` answers."""

    model: Text = Field(min_length=1, max_length=256)
    prompt: Text | None = Field(default=None, min_length=1)
    messages: list[Message] | None = Field(default=None, min_length=1)
    tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1)


class PredictionLine(ResponseModel):
    """What the planner expects of a deployed model."""

    tokens_per_s: float
    time_per_output_token_s: float
    lamports_per_token: int


class QuoteResponse(ResponseModel):
    """The highest and the expected price of a job; `prediction` is null for a model that is not deployed.

    `max_tokens` and `expected_tokens` are those of each answer; the prompt is in the price once.
    """

    model: str
    num_layers: int
    prompt_tokens: int
    max_tokens: int
    expected_tokens: int
    lamports_per_token_layer: int
    max_lamports: int
    expected_lamports: int
    prediction: PredictionLine | None
