"""The choice of a token from each row of scores: a function of the row, its parameters and its key alone.

Tokens have one order: the more probable comes first, of equals the lower id. Top-k and top-p keep a beginning
of it. Of what is kept, the token wins whose exponential number, divided by its probability, is the least: so
each wins as often as it is probable. The number is a hash of the row's key and the token's id. Neither other
rows nor the device change it, and no row has to be sorted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Most rows keep fewer tokens, and a short list is found much faster than an order of all.
_SHORTLIST = 1024
# So many values are computed together: those between lie in a processor's cache, and take little memory.
_VALUES_AT_ONCE = 1 << 20
# Odd numbers that spread the bits of what they multiply, as int32.
_SPREAD, _MIX = -1640531527, -2073254261
# What makes a hash of 31 bits a number between 0 and 1, of which neither is reached in float32.
_SCALE, _HALF = (1 - 2**-22) * 2**-31, 2**-32


@dataclass(frozen=True, slots=True)
class Choice:
    """How a row's token is chosen; `key` has 64 bits.

    A `temperature` of 0 takes the first token. A `top_k` of 0 and a `top_p` of 1 keep all.
    """

    key: int
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


GREEDY = Choice(0, 0.0)


@dataclass(frozen=True, slots=True)
class Kept:
    """What some rows keep: ascending `ids` [rows or 1, n] and `weights` [rows, n], 0 for what is left out."""

    rows: Sequence[int]
    ids: Tensor
    weights: Tensor


def choose(scores: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Return the token id of each row of scores [rows, vocabulary] in float32.

    A row whose highest score is not finite gets any id.
    """
    greedy = [row for row, choice in enumerate(choices) if choice.temperature == 0]
    tokens = (
        scores.argmax(-1) if greedy else torch.empty(len(choices), dtype=torch.long, device=scores.device)
    )
    for kept in kept_tokens(scores, choices):
        tokens[kept.rows] = _winners(kept, [choices[row].key for row in kept.rows])
    return tokens


def kept_tokens(scores: Tensor, choices: Sequence[Choice]) -> Iterator[Kept]:
    """Yield what the rows of scores [rows, vocabulary] that draw keep, in any order of rows."""
    drawing = [row for row, choice in enumerate(choices) if choice.temperature]
    begins = [row for row in drawing if choices[row].top_k or choices[row].top_p < 1]
    for rows in in_parts(sorted(set(drawing) - set(begins)), scores.shape[1]):
        chosen = [choices[row] for row in rows]
        weights = _probabilities(scores, rows, chosen)
        yield Kept(rows, _all_ids(weights), _above_min_p(weights, chosen))
    for rows in in_parts(begins, scores.shape[1]):
        chosen = [choices[row] for row in rows]
        yield from _beginnings(_probabilities(scores, rows, chosen), rows, chosen)


def in_parts(rows: list[int], row_values: int) -> Iterator[list[int]]:
    """Yield some rows of so many values at a time."""
    size = max(1, _VALUES_AT_ONCE // row_values)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _probabilities(scores: Tensor, rows: list[int], choices: Sequence[Choice]) -> Tensor:
    are_neighbours = rows[-1] - rows[0] + 1 == len(rows)
    part = scores[rows[0] : rows[-1] + 1] if are_neighbours else scores[rows]
    # Before the division, whose result may exceed float32 at a low temperature.
    part = part - part.amax(-1, keepdim=True)
    if any(choice.temperature != 1 for choice in choices):
        part /= _column(part, [choice.temperature for choice in choices])
    return part.softmax(-1)


def _beginnings(weights: Tensor, rows: Sequence[int], choices: Sequence[Choice]) -> Iterator[Kept]:
    """Yield what top-k and top-p keep: in a short list where it has all of it, else in the whole rows."""
    size = weights.shape[1]
    lengths = [min(choice.top_k or size, size) for choice in choices]
    width = min(size, max(length + 1 if length < size else _SHORTLIST for length in lengths))
    values, ids = weights.topk(width)
    exact = _exact(values)
    sums = exact.cumsum(-1)
    top_k, top_p = _column(ids, lengths), _column(sums, [choice.top_p for choice in choices])
    total = torch.where(top_k <= width, sums.gather(1, top_k.clamp(max=width) - 1), 1.0)
    limits = torch.where(top_p < 1, top_p * total, torch.inf)
    is_in = (sums - exact < limits) & (torch.arange(width, device=ids.device) < top_k)
    number = is_in.sum(-1, keepdim=True).clamp(min=1)
    least = values.gather(1, number - 1)
    ties = number - (values > least).sum(-1, keepdim=True)
    # Of the tokens that are as probable as its last one, the list may lack some.
    is_listed = ((least > values[:, -1:]) | (width == size)).flatten().tolist()
    is_longer = ((number == width) & (top_k > width)).flatten().tolist()
    listed = [place for place, flag in enumerate(is_listed) if flag]
    whole = [place for place, flag in enumerate(is_listed) if not flag]
    longer = [place for place in whole if is_longer[place]]
    if longer:
        least[longer], ties[longer] = _nucleus(weights[longer], limits[longer])
    edges = least, ties
    if listed:
        own, order = ids[listed].sort(-1)
        yield _kept(rows, choices, listed, own, values[listed].gather(1, order), edges)
    if whole:
        yield _kept(rows, choices, whole, _all_ids(weights), weights[whole], edges)


def _kept(
    rows: Sequence[int],
    choices: Sequence[Choice],
    places: list[int],
    ids: Tensor,
    weights: Tensor,
    edges: tuple[Tensor, Tensor],
) -> Kept:
    """Return what the rows at some places keep: what is above an edge, and the first ids at the edge."""
    least, ties = edges[0][places], edges[1][places]
    at_edge = weights == least
    is_out = (weights < least) | (at_edge & (at_edge.cumsum(-1) > ties))
    weights.masked_fill_(is_out, 0)
    weights = _above_min_p(weights, [choices[place] for place in places])
    return Kept([rows[place] for place in places], ids, weights)


def _above_min_p(weights: Tensor, choices: Sequence[Choice]) -> Tensor:
    if any(choice.min_p for choice in choices):
        least = _column(weights, [choice.min_p for choice in choices]) * weights.amax(-1, keepdim=True)
        weights.masked_fill_(weights < least, 0)
    return weights


def _nucleus(weights: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the edge of the fewest tokens that have `limits` [rows, 1] together.

    It is their least weight [rows, 1], and how many of them have it.
    """
    # Weights have the order of their bits, of which the upper two are 0. A sum for each value of ten of them
    # finds those ten of the edge.
    bits, exact = weights.view(torch.int32), _exact(weights)
    above = torch.zeros_like(limits)
    least = torch.zeros_like(limits, dtype=torch.int32)
    for shift in (20, 10, 0):
        ten = (bits >> shift) & 1023
        sums = exact.new_zeros(len(bits), 1024).scatter_add_(1, ten.long(), exact)
        # The sum of all that is above each value.
        beyond = above + sums.flip(-1).cumsum(-1).flip(-1) - sums
        edge = (beyond >= limits).sum(-1, keepdim=True)
        above = beyond.gather(1, edge)
        least = (least << 10) | edge.int()
        exact.masked_fill_(ten != edge, 0)
    weight = least.view(torch.float32)
    return weight, ((limits - above) / weight).ceil().clamp(max=weights.shape[1]).long()


def _exact(weights: Tensor) -> Tensor:
    """Return multiples of 2**-52: sums of them up to 2 are the same in float64 in every order."""
    return weights.double().add_(1).sub_(1)


def _winners(kept: Kept, keys: Sequence[int]) -> Tensor:
    """Return the token of each row that wins."""
    low = _column(kept.ids, [_as_int32(key) for key in keys], torch.int32)
    high = _column(kept.ids, [_as_int32(key >> 32 | 1) for key in keys], torch.int32)
    hashes = ((kept.ids.int() * _SPREAD) ^ low) * high
    hashes ^= hashes >> 15
    hashes *= _MIX
    hashes ^= hashes >> 16  # which also makes it positive
    # The exponential numbers, negative.
    numbers = hashes.float().mul_(-_SCALE).sub_(_HALF).log1p_()
    winner = torch.div(kept.weights, numbers, out=numbers).argmin(-1, keepdim=True)
    return kept.ids.expand(len(winner), -1).gather(1, winner).flatten()


def _all_ids(weights: Tensor) -> Tensor:
    return torch.arange(weights.shape[1], device=weights.device)[None]


def _column(like: Tensor, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]


def _as_int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31
