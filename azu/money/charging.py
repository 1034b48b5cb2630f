"""What the end of a job charges, and who gets it. Pure."""

from collections import Counter
from collections.abc import Mapping
from itertools import chain

from azu.money.books import BooksTerms
from azu.money.endings import pack_ending
from azu.money.ledger.transfers import MAX_SHARES, NodeEnrolled, Release, Reserve, Settle
from azu.money.pricing import divide, possible_shares
from azu.protocol.job import JobEnding
from azu.units import KIB

# The part of a charge whose work no node has shown is held under this name.
UNSHOWN = "-"
# The books stand still while they divide, and read each entry again and again. Work of more parts (a node in
# a layer) or nodes, and shares with more bytes of names and lamports in their entry, are no honest job's: all
# of it is held.
_MAX_PARTS = 5_000
_MAX_SHARES_BYTES = 32 * KIB
_LAMPORTS_BYTES = 24


def charge_of(
    hold: Reserve,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    work: Mapping[int, Mapping[str, int]],
    ending: JobEnding,
    nodes: Mapping[str, NodeEnrolled],
    terms: BooksTerms,
    now_ms: int,
) -> Settle | Release:
    """Return what ends a job: it charges these tokens and shares the charge out by the work.

    `work` maps layer -> node id -> parameter bytes that the node activated there. `nodes` are those that are
    enrolled, by id. Without a charge all that is reserved goes back. Of work that names more than an honest
    job's can, all is held.
    """
    prompt_tokens = min(max(0, prompt_tokens), hold.prompt_tokens)
    completion_tokens = min(max(0, completion_tokens), hold.max_tokens)
    charged = hold.price_of(prompt_tokens + completion_tokens)
    if not charged:
        return Release(id=f"release:{hold.job_id}", job_id=hold.job_id, outcome=pack_ending(ending))
    work = _of_layers(work, hold.num_layers)
    division = divide(charged, hold.platform_percent, work, hold.num_layers)
    since_ms = hold.expires_at_ms - terms.reservation_ttl_ms
    if hold.reserved_at_ms:
        # The terms may have changed since. Where a clock went back, the hold ends earlier.
        since_ms = min(since_ms, hold.reserved_at_ms)
    workers = {node_id: lamports for node_id, lamports in division.workers.items() if lamports}
    speeds = {one: nodes[one].work_bytes_per_s for one in workers if one in nodes}
    possible = possible_shares(workers, work.values(), speeds, now_ms - since_ms)
    shares, held = Counter[str](), Counter[str]()
    for node_id, lamports in possible.items():
        if not lamports:
            continue
        payout = nodes[node_id].payout if node_id in nodes else terms.others_payout
        if payout is None:
            held[node_id] += lamports
        else:
            shares[payout] += lamports
    if unshown := division.held_lamports + sum(workers.values()) - sum(possible.values()):
        held[UNSHOWN] += unshown
    if _num_bytes(workers) + 2 * (_num_bytes(shares) + _num_bytes(held)) > _MAX_SHARES_BYTES:
        workers, shares, held = {}, Counter(), Counter({UNSHOWN: charged - division.platform_lamports})
    return Settle(
        id=f"settle:{hold.job_id}",
        job_id=hold.job_id,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        charged_lamports=charged,
        platform_lamports=division.platform_lamports,
        shares=shares,
        held=held,
        by_node=workers,
        maturity_ms=terms.maturity_ms,
        outcome=pack_ending(ending),
    )


def _of_layers(work: Mapping[int, Mapping[str, int]], num_layers: int) -> Mapping[int, Mapping[str, int]]:
    """Return the work in a model's layers, none where it has too many parts or nodes."""
    work = {layer: by_node for layer, by_node in work.items() if 0 <= layer < num_layers}
    if sum(map(len, work.values())) > _MAX_PARTS or len({*chain.from_iterable(work.values())}) > MAX_SHARES:
        return {}
    return work


def _num_bytes(lamports_of: Mapping[str, int]) -> int:
    """Return how long the names are with the lamports beside them; accounts and payees are named twice."""
    return sum(len(name) + _LAMPORTS_BYTES for name in lamports_of)
