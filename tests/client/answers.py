"""What an ingress sends of an answer."""

from typing import Any

from azu.api.openai import AzuFields, ChatChunk, ChatChunkChoice, Delta, TextChoice, TextChunk, Usage
from azu.api.receipts import ReceiptLines

MODEL = "azu/tiny-dense"
HEAD: dict[str, Any] = {"id": "cmpl-job-1", "created": 7, "model": MODEL}
USAGE = Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5, cost_lamports=60)
RECEIPT = {
    "job_id": "job-1", "address": "0xb", "model_id": MODEL, "revision": "r1",
    "lamports_per_token_layer": 2, "prompt_tokens": 3, "completion_tokens": 2, "num_layers": 6,
    "token_layers": 30, "charged_lamports": 60, "released_lamports": 40, "platform_lamports": 12,
    "worker_lamports": {"0xa": 48}, "transfer_id": "settle:job-1",
    "topology": [{"node": "ada", "actor": "layer:0", "layers": [0, 6], "experts": {"2": [0, 1]}}],
}  # fmt: skip


def piece(text: str, *, finish: str | None = None, after: int = 0, index: int = 0, **given: Any) -> Any:
    """Return a chunk of a plain completion."""
    choice = TextChoice(index=index, text=text, logprobs=given.get("logprobs"), finish_reason=finish)
    azu = AzuFields(job_id="job-1", after=after)
    return TextChunk(**HEAD, azu=azu, choices=(choice,)).model_dump(mode="json")


def delta(text: str | None, *, finish: str | None = None, index: int = 0, **given: Any) -> Any:
    """Return a chunk of a chat; `given` are more of the delta's fields, and its log probabilities."""
    logprobs = given.pop("logprobs", None)
    new = Delta(content=text, **given)
    choice = ChatChunkChoice(index=index, delta=new, logprobs=logprobs, finish_reason=finish)
    azu = AzuFields(job_id="job-1", after=0)
    return ChatChunk(**HEAD, azu=azu, choices=(choice,)).model_dump(mode="json")


def last_chunk(kind: type[TextChunk] | type[ChatChunk] = TextChunk) -> Any:
    """Return the chunk with the usage and the receipt."""
    azu = AzuFields(job_id="job-1", receipt=ReceiptLines.model_validate(RECEIPT))
    return kind(**HEAD, azu=azu, choices=(), usage=USAGE).model_dump(mode="json")
