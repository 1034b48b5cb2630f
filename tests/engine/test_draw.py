"""The draw: what is kept is transformers' choice, and a token comes as often as it is probable."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from azu.engine.draw import GREEDY, Choice, choose, kept_tokens

# Wider than the short list.
_VOCABULARY = 3_001
_KEY = 0x9D2C_5680_F00D_BEEF
_CHOICES = [
    Choice(_KEY, 1.0),
    Choice(_KEY, 0.7),
    Choice(_KEY, 1.0, min_p=0.05),
    Choice(_KEY, 0.7, top_k=1),
    Choice(_KEY, 0.7, top_k=50),
    Choice(_KEY, 2.0, top_k=1_500),
    Choice(_KEY, 1.0, top_k=1_000_000),
    Choice(_KEY, 0.7, top_p=0.9),
    Choice(_KEY, 2.0, top_p=0.9),
    Choice(_KEY, 1.5, top_p=0.999_999),
    Choice(_KEY, 1.0, top_k=40, top_p=0.8, min_p=0.01),
    Choice(_KEY, 2.0, top_k=2_500, top_p=0.95, min_p=0.001),
]


def _scores(scale: float, seed: int = 0, vocabulary: int = _VOCABULARY) -> Tensor:
    return torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def _by_transformers(scores: Tensor, choice: Choice) -> Tensor:
    """Return the probability of each token [vocabulary]."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(choice.temperature)])
    if choice.top_k:
        processors.append(TopKLogitsWarper(choice.top_k))
    if choice.top_p < 1:
        processors.append(TopPLogitsWarper(choice.top_p))
    if choice.min_p:
        processors.append(MinPLogitsWarper(choice.min_p))
    probabilities: Tensor = processors(torch.zeros(1, 1, dtype=torch.long), scores).softmax(-1)[0]
    return probabilities


def _by_order(scores: Tensor, choice: Choice) -> Tensor:
    """Return the probability of each token [vocabulary], by the definition and in float64."""
    weights = (scores[0].double() / choice.temperature).softmax(0)
    order = weights.sort(descending=True, stable=True).indices
    weights[order[choice.top_k or len(order) :]] = 0
    before = weights[order].cumsum(0) - weights[order]
    weights[order[before >= choice.top_p * weights.sum()]] = 0
    weights[weights < choice.min_p * weights.max()] = 0
    return weights / weights.sum()


def _kept(scores: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Return the probability of each token [rows, vocabulary] of rows that draw."""
    found = torch.zeros(scores.shape, dtype=torch.float64)
    for kept in kept_tokens(scores, choices):
        for row, weights in zip(kept.rows, kept.weights.double(), strict=True):
            ids = kept.ids.expand(len(kept.rows), -1)[list(kept.rows).index(row)]
            assert (ids.diff() > 0).all()
            found[row, ids] = weights / weights.sum()
    return found


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0, 10.0])
def test_what_is_kept_is_what_transformers_keeps(scale: float) -> None:
    rows = [_scores(scale, seed) for seed in range(len(_CHOICES))]

    found = _kept(torch.cat(rows), _CHOICES)

    for own, scores, choice in zip(found, rows, _CHOICES, strict=True):
        expected = _by_transformers(scores, choice)
        # Tokens whose probability is next to nothing may be kept or not: transformers adds up in float32.
        assert torch.equal(own > 1e-6, expected > 1e-6), choice
        assert (own - expected).abs().max() < 1e-6, choice


@pytest.mark.parametrize("step", [8.0, 0.5, 2**-5])  # equal scores in crowds, as in bfloat16
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_of_equal_tokens_the_lower_ids_are_kept(scale: float, step: float) -> None:
    rows = [(_scores(scale, seed) / step).round() * step for seed in range(len(_CHOICES))]

    found = _kept(torch.cat(rows), _CHOICES)

    for own, scores, choice in zip(found, rows, _CHOICES, strict=True):
        expected = _by_order(scores, choice)
        if choice.top_p > 0.999:
            assert (own - expected).abs().sum() < 1e-5, choice
        else:
            assert torch.equal(own > 0, expected > 0), choice
            assert (own - expected).abs().max() < 1e-6, choice


def test_top_k_1_takes_the_first_of_equal_tokens() -> None:
    choices = [Choice(key * _KEY % 2**64, 1.0, top_k=1) for key in range(50)]

    assert choose(torch.zeros(50, _VOCABULARY), choices).tolist() == [0] * 50


@pytest.mark.parametrize(
    "choice", [_CHOICES[place] for place in (0, 2, 4, 5, 7, 8, 10)], ids=lambda choice: str(choice)[7:]
)
def test_each_token_is_drawn_as_often_as_it_is_probable(choice: Choice) -> None:
    scores, chance, number = _scores(2.0), random.Random(1), 8_000
    expected = _by_order(scores, choice)
    keyed = [replace(choice, key=chance.getrandbits(64)) for _ in range(number)]

    drawn = torch.cat([choose(scores.expand(500, -1), keyed[n : n + 500]) for n in range(0, number, 500)])

    counts = torch.bincount(drawn, minlength=_VOCABULARY).double()
    assert not counts[expected == 0].any()
    # Tokens that are expected less than ten times count as one.
    often = expected * number >= 10
    sums = [torch.cat([each[often], each[~often].sum()[None]]) for each in (counts, expected * number)]
    seen, wanted = (each[sums[1] >= 10] for each in sums)
    chi_square = float(((seen - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    # Four standard deviations of the distribution's.
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_the_draws_of_near_keys_do_not_depend_on_each_other() -> None:
    scores, number = torch.zeros(1, 16), 16_384
    choices = [Choice(_KEY + key, 1.0) for key in range(number)]

    drawn = choose(scores.expand(number, -1), choices)

    for distance in (1, 2, 256):
        pairs = torch.bincount(drawn[:-distance] * 16 + drawn[distance:], minlength=256).double()
        wanted = (number - distance) / 256
        assert abs(float(((pairs - wanted) ** 2 / wanted).sum()) - 255) < 4 * math.sqrt(2 * 255)


@pytest.mark.parametrize("vocabulary", [50, _VOCABULARY, 50_257])
def test_a_row_is_drawn_alike_alone_and_in_every_batch(vocabulary: int) -> None:
    chance = random.Random(2)
    choices = [GREEDY, *(replace(one, key=chance.getrandbits(64)) for one in _CHOICES * 3)]
    scores = torch.cat([_scores(chance.choice([0.3, 3.0]), seed, vocabulary) for seed in range(len(choices))])
    alone = [int(choose(row[None], [choice])) for row, choice in zip(scores, choices, strict=True)]

    for _ in range(3):
        rows = chance.sample(range(len(choices)), chance.randint(2, len(choices)))
        together = choose(scores[rows], [choices[row] for row in rows])
        assert together.tolist() == [alone[row] for row in rows]


def _in_integers(scores: Tensor, choice: Choice) -> int:
    """Return the token that wins among all, with Python's whole numbers and float64 as on any machine."""
    wins, winner = -1.0, 0
    low, high = choice.key & 0xFFFF_FFFF, (choice.key >> 32) | 1
    for token, weight in enumerate((scores[0].double() / choice.temperature).softmax(0).tolist()):
        hashed = ((token * 0x9E37_79B9 ^ low) * high) & 0xFFFF_FFFF
        hashed ^= (hashed >> 15) | (0xFFFE_0000 if hashed >> 31 else 0)
        hashed = hashed * 0x846C_A68B & 0xFFFF_FFFF
        hashed ^= (hashed >> 16) | (0xFFFF_0000 if hashed >> 31 else 0)
        worth = weight / -math.log1p(-(hashed + 0.5) / 2**31)
        if worth > wins:
            wins, winner = worth, token
    return winner


def test_the_draw_is_the_same_function_everywhere() -> None:
    chance = random.Random(3)
    choices = [Choice(chance.getrandbits(64), 0.8) for _ in range(40)]
    scores = [_scores(1.0, seed) for seed in range(40)]

    found = choose(torch.cat(scores), choices).tolist()

    assert found == [_in_integers(*each) for each in zip(scores, choices, strict=True)]
