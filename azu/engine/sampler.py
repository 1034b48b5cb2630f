"""The next token of each open sequence: its logits, changed as its parameters say, and a draw from them."""

import logging
import math
import struct
from collections.abc import Iterable, Sequence

import torch
import xxhash
from torch import Tensor

from azu.engine.draw import GREEDY, Choice, choose, in_parts
from azu.engine.stage_contract import fault_of
from azu.errors import NUMERICS_ERROR, FrameError, InternalError
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import OpenedSequence, SampledToken, SeenTokens, SequenceFault

log = logging.getLogger(__name__)

_DRAW = struct.Struct("<QQ")
_DOING = "the choice of a token"
# float32 has no smaller normal number: below it the highest logit has the whole probability.
_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny

# The log probability of a token, and the most likely tokens with theirs, best first.
_Likely = tuple[float, tuple[tuple[int, float], ...]]


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
        found = self._sampled([self._open[sequence_id] for sequence_id in sequence_ids], logits.float())
        tokens = tuple(one for one in found if isinstance(one, SampledToken))
        return tokens, tuple(one for one in found if isinstance(one, SequenceFault))

    def _sampled(
        self, sequences: "Sequence[_OpenSequence]", logits: Tensor
    ) -> list[SampledToken | SequenceFault]:
        """Sample together; where that fails, in halves, down to the sequences that fail alone."""
        try:
            for sequence in sequences:
                sequence.prepare(logits)
            return _next_tokens(sequences, logits)
        except Exception as error:
            if len(sequences) == 1:
                return [fault_of(sequences[0].sequence_id, error, _DOING)]
            log.warning("%d sequences could not be sampled together: they are sampled apart", len(sequences))
        middle = len(sequences) // 2
        first = self._sampled(sequences[:middle], logits[:middle])
        return first + self._sampled(sequences[middle:], logits[middle:])


class _OpenSequence:
    """A sequence's parameters and what they look at: its tensors are made when it samples first.

    What fails then is this sequence's fault.
    """

    def __init__(self, opened: OpenedSequence, seen: SeenTokens | None) -> None:
        self.sequence_id = opened.sequence_id
        self.sampling = opened.sampling
        self.counts: _Counts | None = None
        self.bias: tuple[Tensor, Tensor] | None = None
        self._draw_key = opened.draw_key
        self._num_generated = opened.num_generated
        self._seen = seen
        self._ends: Tensor | None = None
        self._is_prepared = False

    def prepare(self, logits: Tensor) -> None:
        """Make the tensors on the device of logits [..., vocabulary]."""
        if self._is_prepared:
            return
        sampling, vocab_size, device = self.sampling, logits.shape[-1], logits.device
        _check(sampling)
        if sampling.logit_bias:
            ids = _token_ids(sampling.logit_bias, vocab_size, device)
            self.bias = ids, torch.tensor(list(sampling.logit_bias.values()), device=device)
        if sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = _Counts(self._seen, vocab_size, device)
        # A model's files may name ends that it has no logit for.
        ends = [token for token in sampling.stop_token_ids if token < vocab_size]
        if sampling.min_tokens and ends:
            self._ends = _token_ids(ends, vocab_size, device)
        self._seen, self._is_prepared = None, True

    @property
    def forbidden(self) -> Tensor | None:
        """The tokens that may not come yet."""
        return self._ends if self._num_generated < self.sampling.min_tokens else None

    def choice(self) -> Choice:
        """Return how the next token is chosen."""
        sampling = self.sampling
        if sampling.temperature < _LEAST_TEMPERATURE:
            return GREEDY
        key = xxhash.xxh3_64_intdigest(_DRAW.pack(self._draw_key, self._num_generated))
        return Choice(key, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)

    def add(self, token_id: int) -> None:
        """Take the next token into account."""
        self._num_generated += 1
        if self.counts is not None:
            self.counts.add(token_id)


class _Counts:
    """How often a sequence generated each of its tokens, on the device; 0 for those of the prompt alone."""

    def __init__(self, seen: SeenTokens | None, vocab_size: int, device: torch.device) -> None:
        counts = dict.fromkeys(seen.prompt_token_ids if seen else (), 0)
        for token in seen.generated if seen else ():
            counts[token] = counts.get(token, 0) + 1
        self._places = {token: place for place, token in enumerate(counts)}
        self._ids = _token_ids(counts, vocab_size, device)
        self._times = torch.tensor(list(counts.values()), dtype=torch.float32, device=device)

    @property
    def ids(self) -> Tensor:
        """The tokens."""
        return self._ids[: len(self._places)]

    @property
    def times(self) -> Tensor:
        """The count of each of `ids`."""
        return self._times[: len(self._places)]

    def add(self, token_id: int) -> None:
        """Count a token."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = torch.cat([self._ids, self._ids.new_zeros(place + 16)])
            self._times = torch.cat([self._times, self._times.new_zeros(place + 16)])
        self._ids[place] = token_id
        self._times[place] += 1


def _needs_tokens(opened: OpenedSequence) -> bool:
    sampling = opened.sampling
    counts = sampling.presence_penalty or sampling.frequency_penalty
    return sampling.repetition_penalty != 1.0 or bool(counts and opened.num_generated)


def _check(sampling: SamplingParams) -> None:
    """Raise ValueError for numbers that no request may have, and for which no draw is defined."""
    if not (
        0 <= sampling.temperature < math.inf
        and sampling.top_k >= 0
        and sampling.top_p >= 0
        and 0 <= sampling.min_p <= 1
        and sampling.repetition_penalty > 0
    ):
        raise ValueError("sampling parameters out of their ranges")


def _token_ids(ids: Iterable[int], vocab_size: int, device: torch.device) -> Tensor:
    """Return token ids as a tensor; a GPU would not survive one that is no token's."""
    listed = list(ids)
    if not all(0 <= token < vocab_size for token in listed):
        raise ValueError("a token id outside of the vocabulary")
    return torch.tensor(listed, dtype=torch.long, device=device)


def _next_tokens(sequences: Sequence[_OpenSequence], logits: Tensor) -> list[SampledToken | SequenceFault]:
    scores = _changed(logits, sequences)
    are_finite = scores.amax(-1).isfinite().tolist()
    choices = [
        one.choice() if is_finite else GREEDY for one, is_finite in zip(sequences, are_finite, strict=True)
    ]
    chosen = choose(scores, choices)
    logprobs = _logprobs(logits, chosen, sequences)
    found: list[SampledToken | SequenceFault] = []
    for row, (one, token_id) in enumerate(zip(sequences, chosen.tolist(), strict=True)):
        try:
            if not are_finite[row]:
                raise InternalError(
                    "the sampling parameters leave no token a finite score: use smaller values",
                    code=NUMERICS_ERROR,
                )
            one.add(token_id)
            found.append(SampledToken(one.sequence_id, token_id, *logprobs.get(row, ())))
        except Exception as error:
            found.append(fault_of(one.sequence_id, error, _DOING))
    return found


def _changed(logits: Tensor, sequences: Sequence[_OpenSequence]) -> Tensor:
    """Return the scores after biases and penalties, in the order in which transformers' generate has them.

    Only the values of tokens that a parameter names, or that came before, are changed.
    """
    biased = [(row, one.bias) for row, one in enumerate(sequences) if one.bias is not None]
    counted = [(row, one.counts) for row, one in enumerate(sequences) if one.counts is not None]
    forbidden = [(row, one.forbidden) for row, one in enumerate(sequences) if one.forbidden is not None]
    if not (biased or counted or forbidden):
        return logits
    scores = logits.clone()
    if biased:
        places = _places([(row, ids) for row, (ids, _) in biased])
        scores[places] += torch.cat([values for _, (_, values) in biased])
    if counted:
        places = _places([(row, counts.ids) for row, counts in counted])
        times = torch.cat([counts.times for _, counts in counted])
        penalties = [
            (one.repetition_penalty, one.presence_penalty, one.frequency_penalty)
            for one in (sequence.sampling for sequence in sequences)
        ]
        repetition, presence, frequency = torch.tensor(penalties, device=scores.device)[places[0]].unbind(-1)
        values = scores[places]
        values = torch.where(values < 0, values * repetition, values / repetition)
        scores[places] = values - torch.where(times > 0, presence + frequency * times, 0)
    if forbidden:
        scores[_places(forbidden)] = -torch.inf
    return scores


def _places(ids: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the rows and the columns of token ids, which come beside their row."""
    columns = torch.cat([own for _, own in ids])
    rows, lengths = torch.tensor([(row, len(own)) for row, own in ids], device=columns.device).unbind(-1)
    return rows.repeat_interleave(lengths, output_size=len(columns)), columns


def _logprobs(logits: Tensor, chosen: Tensor, sequences: Sequence[_OpenSequence]) -> dict[int, _Likely]:
    """Return the log probabilities of the logits as they were, for the rows that ask for them."""
    found: dict[int, _Likely] = {}
    wanted = {row: one.sampling.logprobs for row, one in enumerate(sequences)}
    for rows in in_parts([row for row, number in wanted.items() if number is not None], logits.shape[1]):
        part = logits[rows].log_softmax(-1)
        # The probability of a token may be below what the logarithm of a float32 can be.
        part.clamp_(min=torch.finfo(part.dtype).min)
        own = part.gather(1, chosen[rows, None]).flatten().tolist()
        numbers = [wanted[row] or 0 for row in rows]
        # One more shows whether others are as likely as the last one.
        values, ids = (each.tolist() for each in part.topk(min(max(numbers) + 1, part.shape[1])))
        for place, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            top = sorted(zip(ids[place], values[place], strict=True), key=lambda one: (-one[1], one[0]))
            if 0 < number < len(top) and top[number - 1][1] == top[-1][1]:
                last = top[-1][1]
                others = (part[place] == last).nonzero()[:number].flatten().tolist()
                top = [one for one in top if one[1] > last] + [(token_id, last) for token_id in others]
            found[row] = own[place], tuple(top[:number])
    return found
