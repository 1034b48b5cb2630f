"""What a job costs in lamports, before it runs and after, and how platform and workers share it."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from azu.errors import InternalError


def charge(prompt_tokens: int, completion_tokens: int, num_layers: int, lamports_per_token_layer: int) -> int:
    """Return the lamports for what was delivered: (prompt + completion tokens) x layers x price.

    EOS counts as a token; the prompt counts once, however many completions share it; nothing is charged
    before the first token.
    """
    assert min(prompt_tokens, completion_tokens, num_layers, lamports_per_token_layer) >= 0
    if completion_tokens == 0:
        return 0
    return (prompt_tokens + completion_tokens) * num_layers * lamports_per_token_layer


def max_charge(
    prompt_tokens: int, max_completion_tokens: int, num_layers: int, lamports_per_token_layer: int
) -> int:
    """Return the most that a job can cost, in lamports: the amount that is reserved before it runs."""
    return charge(prompt_tokens, max_completion_tokens, num_layers, lamports_per_token_layer)


@dataclass(frozen=True, slots=True)
class Division:
    """A charge divided: the platform's lamports, and payout address -> lamports."""

    platform_lamports: int
    workers: Mapping[str, int]


def divide(
    charged_lamports: int, platform_percent: int, work: Mapping[int, Mapping[str, int]], num_layers: int
) -> Division:
    """Divide a charge so that platform and workers sum to it exactly.

    `work` maps layer -> payout address -> parameter bytes activated there for charged tokens. Each layer
    has the same weight; within a layer the bytes count. Raises InternalError for impossible work.
    """
    assert charged_lamports >= 0
    assert 0 <= platform_percent <= 100
    _check(work, num_layers)
    ran = [layer for layer in work.values() if sum(layer.values())]
    # One rounding for both: the platform gets the remainder.
    pot = charged_lamports * (100 - platform_percent) * len(ran) // (100 * max(num_layers, 1))
    workers = _by_largest_remainder(pot, _claims(ran))
    return Division(charged_lamports - pot, workers)


def _check(work: Mapping[int, Mapping[str, int]], num_layers: int) -> None:
    for layer, by_payout in work.items():
        if not 0 <= layer < num_layers:
            raise InternalError(f"work was recorded for layer {layer} of a model with {num_layers}")
        if min(by_payout.values(), default=0) < 0:
            raise InternalError(f"less than no work was recorded for layer {layer}")


def _claims(ran: list[Mapping[str, int]]) -> dict[str, Fraction]:
    """Return each payout's part of the pot; the parts sum to one."""
    claims: dict[str, Fraction] = {}
    for by_payout in ran:
        whole = sum(by_payout.values()) * len(ran)
        for payout, activated_bytes in by_payout.items():
            claims[payout] = claims.get(payout, Fraction()) + Fraction(activated_bytes, whole)
    return claims


def _by_largest_remainder(pot: int, claims: Mapping[str, Fraction]) -> dict[str, int]:
    exact = {payout: pot * claim for payout, claim in claims.items()}
    shares = {payout: int(amount) for payout, amount in exact.items()}
    left = pot - sum(shares.values())
    for payout in sorted(exact, key=lambda payout: (shares[payout] - exact[payout], payout))[:left]:
        shares[payout] += 1
    return shares
