"""The sampling parameters of one sequence: how its tokens are chosen and when it ends."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import ConfigDict


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling of one sequence, with transformers' names and meanings.

    `temperature` 0 is greedy. The token at index n depends only on the prompt, the logits, `seed` and n, so
    that a sequence can continue anywhere. `stop_token_ids` end the sequence as EOS does.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
