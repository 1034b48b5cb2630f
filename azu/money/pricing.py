"""What a job costs in lamports, before it runs and after, and how platform and workers share it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from azu.protocol.job import PLATFORM_NODE

# No node activates as many in a layer for one job.
_MOST_BYTES = 2**63
# Exact fractions of many layers have denominators of many digits: the books would stand still for them. What
# these parts are too coarse for is far less than a lamport.
_WHOLE = 2**192


# The work of the fastest device known for a model: one with 2.5e15 bfloat16 operations a second.
_FASTEST_BYTES_PER_S = 5 * 10**15
# A busy machine measures too little. A node that is honest loses nothing by a bound that is too wide.
_MARGIN = 4
# Clocks differ, and entries of the same moment have the same time.
_LEAST_MS = 1000


def charged_prompt(prompt_tokens: int, completion_tokens: int, prompt_tokens_ran: int) -> int:
    """Return how many prompt tokens are charged: all once there is a token, before that those that ran.

    `prompt_tokens_ran` is 0 for a job that azu itself ended: before its first token it costs nothing.
    """
    return prompt_tokens if completion_tokens else min(prompt_tokens, prompt_tokens_ran)


def charge(
    prompt_tokens: int,
    completion_tokens: int,
    num_layers: int,
    lamports_per_token_layer: int,
    prompt_tokens_ran: int = 0,
) -> int:
    """Return the lamports for what was delivered: (prompt + completion tokens) x layers x price.

    EOS counts as a token; the prompt counts once, however many completions share it. Without a token only
    `prompt_tokens_ran` are charged: the prompt tokens that ran before the job's own client left.
    """
    assert min(prompt_tokens, completion_tokens, num_layers, lamports_per_token_layer, prompt_tokens_ran) >= 0
    charged = charged_prompt(prompt_tokens, completion_tokens, prompt_tokens_ran) + completion_tokens
    return charged * num_layers * lamports_per_token_layer


def max_charge(
    prompt_tokens: int, max_completion_tokens: int, num_layers: int, lamports_per_token_layer: int
) -> int:
    """Return the most that a job can cost, in lamports: the amount that is reserved before it runs."""
    return charge(prompt_tokens, max_completion_tokens, num_layers, lamports_per_token_layer)


@dataclass(frozen=True, slots=True)
class Division:
    """A charge divided: the platform's lamports, payee -> lamports, and those whose owner is unknown."""

    platform_lamports: int
    workers: Mapping[str, int]
    held_lamports: int = 0


def divide(
    charged_lamports: int, platform_percent: int, work: Mapping[int, Mapping[str, int]], num_layers: int
) -> Division:
    """Divide a charge so that platform, workers and what is held sum to it exactly, whatever `work` says.

    `work` maps layer -> payee -> parameter bytes activated there for charged tokens. Each layer has the same
    weight; within a layer the bytes count. The share of a layer without work, or with work that no payee can
    have done, is held. Work in layers that the model does not have counts for nothing. PLATFORM_NODE stands
    for the platform among the payees.
    """
    assert charged_lamports >= 0
    assert 0 <= platform_percent <= 100
    # As many steps as there is work: who asks for a settlement also chose the number of layers.
    ran = [work[index] for index in sorted(work) if 0 <= index < num_layers and _is_possible(work[index])]
    # One rounding for all of them: the platform gets the remainder.
    share = charged_lamports * (100 - platform_percent) // 100
    pot = charged_lamports * (100 - platform_percent) * len(ran) // (100 * max(num_layers, 1))
    workers = _by_largest_remainder(pot, _claims(ran))
    platform = charged_lamports - share + workers.pop(PLATFORM_NODE, 0)
    return Division(platform, workers, share - pot)


def _is_possible(by_payee: Mapping[str, int]) -> bool:
    return min(by_payee.values(), default=0) >= 0 and 0 < sum(by_payee.values()) < _MOST_BYTES


def _claims(ran: list[Mapping[str, int]]) -> dict[str, int]:
    """Return each payee's part of the pot, in parts of _WHOLE; those of all payees sum to just below it."""
    claims: dict[str, int] = {}
    for by_payee in ran:
        whole = sum(by_payee.values()) * len(ran)
        for payee, activated_bytes in by_payee.items():
            claims[payee] = claims.get(payee, 0) + activated_bytes * _WHOLE // whole
    return claims


def _by_largest_remainder(pot: int, claims: Mapping[str, int]) -> dict[str, int]:
    exact = {payee: divmod(pot * claim, _WHOLE) for payee, claim in claims.items()}
    shares = {payee: lamports for payee, (lamports, _) in exact.items()}
    left = pot - sum(shares.values())
    for payee in sorted(exact, key=lambda payee: (-exact[payee][1], payee))[:left]:
        shares[payee] += 1
    return shares


def possible_shares(
    shares: Mapping[str, int],
    work: Iterable[Mapping[str, int]],
    work_bytes_per_s: Mapping[str, int],
    elapsed_ms: int,
) -> Mapping[str, int]:
    """Return what of each node's lamports is for work that it can have done in a job that took this long.

    `work` are the parameter bytes by node of each layer. `work_bytes_per_s` is what nodes measured of
    themselves, 0 for one that measured nothing; the fastest known device bounds all.
    """
    done = Counter[str]()
    for by_node in work:
        done.update({node: max(0, activated_bytes) for node, activated_bytes in by_node.items()})
    possible: dict[str, int] = {}
    for node, lamports in shares.items():
        speed = min(work_bytes_per_s.get(node) or _FASTEST_BYTES_PER_S, _FASTEST_BYTES_PER_S)
        most = _MARGIN * speed * max(elapsed_ms, _LEAST_MS) // 1000
        possible[node] = lamports if done[node] <= most else lamports * most // done[node]
    return possible
