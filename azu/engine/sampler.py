"""The choice of each sequence's next token, with transformers' logits processors and no random state."""

import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import xxhash
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from azu.engine.stage_contract import fault_of
from azu.errors import NUMERICS_ERROR, FrameError, InternalError
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import OpenedSequence, SampledToken, SeenTokens, SequenceFault

_SEED = struct.Struct("<QQ")
# float32 has no smaller normal number: below it the highest logit has the whole probability.
_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny
# Below this temperature a logit divided by it may exceed float32.
_LOW_TEMPERATURE = 0.01


class Sampler:
    """Samples for opened sequences; the token at index n depends only on the prompt, logits, seed and n."""

    def __init__(self) -> None:
        self._open: dict[int, _OpenSequence] = {}
        self._seen: dict[int, SeenTokens] = {}

    def see(self, sequences: Iterable[SeenTokens]) -> None:
        """Store tokens of sequences that are opened next; another thread may sample meanwhile."""
        for seen in sequences:
            self._seen[seen.sequence_id] = seen

    def open(self, sequences: Iterable[OpenedSequence]) -> None:
        """Store parameters; a sequence that is opened again starts after its generated tokens.

        Raises FrameError for one whose penalties look at tokens that did not come before.
        """
        for opened in sequences:
            seen = self._seen.pop(opened.sequence_id, None)
            if seen is None and _needs_tokens(opened):
                raise FrameError(f"sequence {opened.sequence_id} was opened without its tokens")
            self._open[opened.sequence_id] = _OpenSequence(opened, seen)

    def close(self, sequence_ids: Iterable[int]) -> None:
        """Forget sequences. An unknown id is not an error, because a close may be repeated."""
        for sequence_id in sequence_ids:
            self._open.pop(sequence_id, None)
            self._seen.pop(sequence_id, None)

    def clear(self) -> None:
        """Forget every sequence."""
        self._open.clear()
        self._seen.clear()

    def sample(
        self, sequence_ids: Sequence[int], logits: Tensor
    ) -> tuple[tuple[SampledToken, ...], tuple[SequenceFault, ...]]:
        """Return one new token per row of finite logits [num_sequences, vocabulary], or the sequence's fault.

        Raises FrameError for a sequence that was never opened.
        """
        unknown = [sequence_id for sequence_id in sequence_ids if sequence_id not in self._open]
        if unknown:
            raise FrameError(f"sequence {unknown[0]} was never opened at the last stage")
        logits = logits.float().cpu()
        best = logits.argmax(-1).tolist()
        tokens, faults = [], []
        for sequence_id, row, choice in zip(sequence_ids, logits, best, strict=True):
            try:
                tokens.append(self._open[sequence_id].next(row, choice))
            except Exception as error:
                faults.append(fault_of(sequence_id, error, "the choice of a token"))
        return tuple(tokens), tuple(faults)


class _OpenSequence:
    def __init__(self, opened: OpenedSequence, seen: SeenTokens | None) -> None:
        self._id = opened.sequence_id
        self._sampling = sampling = opened.sampling
        if sampling.temperature < _LEAST_TEMPERATURE:
            self._sampling = sampling = replace(sampling, temperature=0.0)
        self._draw_key = opened.draw_key
        prompt = seen.prompt_token_ids if seen else ()
        generated = seen.generated if seen else ()
        self._num_prompt = len(prompt)
        # Of tokens that no penalty looks at the number counts, and not which they are.
        self._tokens = [*prompt, *(generated or [0] * opened.num_generated)]
        self._counts = Counter(generated)
        self._processors: LogitsProcessorList | None = None

    def next(self, logits: Tensor, best: int) -> SampledToken:
        """Choose from logits [vocabulary]; `best` is their greedy choice."""
        if self._processors is None:
            # Not when the sequence is opened: what fails here is this sequence's fault.
            self._processors = _processors(self._sampling, self._num_prompt, self._counts)
        if not self._processors and self._sampling.temperature == 0:
            token = best
        else:
            scores = self._processors(torch.tensor([self._tokens]), logits[None].clone())
            if not bool(scores.amax().isfinite()):
                raise InternalError(
                    "the sampling parameters leave no token a finite score: use smaller values",
                    code=NUMERICS_ERROR,
                )
            token = int(scores.argmax()) if self._sampling.temperature == 0 else self._draw(scores)
        self._tokens.append(token)
        self._counts[token] += 1
        if self._sampling.logprobs is None:
            return SampledToken(self._id, token)
        # The probability of a token may be below what the logarithm of a float32 can be.
        logprobs = logits.log_softmax(-1).clamp(min=torch.finfo(torch.float32).min)
        top = logprobs.topk(min(self._sampling.logprobs, len(logprobs)))
        ranked = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return SampledToken(self._id, token, float(logprobs[token]), ranked)

    def _draw(self, scores: Tensor) -> int:
        index = len(self._tokens) - self._num_prompt
        # A new generator for each draw: a stage that continues the sequence at any index draws the same
        # token.
        seed = xxhash.xxh3_64_intdigest(_SEED.pack(self._draw_key, index))
        generator = torch.Generator().manual_seed(seed)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


def _needs_tokens(opened: OpenedSequence) -> bool:
    sampling = opened.sampling
    counts = sampling.presence_penalty or sampling.frequency_penalty
    return sampling.repetition_penalty != 1.0 or bool(counts and opened.num_generated)


class _Bias(LogitsProcessor):  # type: ignore[misc] # transformers is untyped
    """OpenAI's logit_bias: adds a value to the logits of single tokens."""

    def __init__(self, bias: Iterable[tuple[int, float]]) -> None:
        pairs = tuple(bias)
        self._ids = torch.tensor([token for token, _ in pairs])
        self._values = torch.tensor([value for _, value in pairs])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        return scores.index_add(1, self._ids, self._values[None].to(scores.dtype))


class _BelowZero(LogitsProcessor):  # type: ignore[misc]
    """Subtracts the highest logit, which changes no probability and keeps quotients from becoming inf."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        return scores - scores.amax(-1, keepdim=True)


class _CountPenalty(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's presence and frequency penalties, over the tokens generated so far."""

    def __init__(self, counts: Counter[int], presence: float, frequency: float) -> None:
        self._counts = counts
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        if not self._counts:
            return scores
        ids = torch.tensor(list(self._counts))
        counts = torch.tensor(list(self._counts.values()), dtype=scores.dtype)
        return scores.index_add(1, ids, -(self._presence + self._frequency * counts)[None])


class _TopP(LogitsProcessor):  # type: ignore[misc]
    """Keeps the fewest tokens with a probability of `top_p` together; of equal ones the first ids.

    transformers' own leaves the order of equal ones to the device.
    """

    def __init__(self, top_p: float) -> None:
        self._top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        probabilities, order = scores.softmax(-1).sort(descending=True, stable=True)
        is_out = probabilities.cumsum(-1) - probabilities >= self._top_p
        is_out[:, 0] = False
        return scores.masked_fill(is_out.scatter(1, order, is_out), -torch.inf)


def _processors(sampling: SamplingParams, num_prompt: int, counts: Counter[int]) -> LogitsProcessorList:
    """Return the processors of the logits, in the order in which transformers' generate applies them."""
    chosen = LogitsProcessorList()
    if sampling.logit_bias:
        chosen.append(_Bias(sampling.logit_bias.items()))
    if sampling.repetition_penalty != 1.0:
        chosen.append(RepetitionPenaltyLogitsProcessor(penalty=sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        chosen.append(_CountPenalty(counts, sampling.presence_penalty, sampling.frequency_penalty))
    ends = list(sampling.stop_token_ids)
    if sampling.min_tokens and ends:
        chosen.append(MinNewTokensLengthLogitsProcessor(num_prompt, sampling.min_tokens, ends, device="cpu"))
    if sampling.temperature == 0:
        return chosen
    if sampling.temperature < _LOW_TEMPERATURE:
        chosen.append(_BelowZero())
    if sampling.temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chosen.append(TopKLogitsWarper(top_k=sampling.top_k))
    if sampling.top_p < 1.0:
        chosen.append(_TopP(sampling.top_p))
    if sampling.min_p:
        chosen.append(MinPLogitsWarper(min_p=sampling.min_p))
    return chosen
