"""What the end of a job charges, and who gets it. Pure."""

from collections import Counter
from collections.abc import Mapping

from azu.money.books import BooksTerms
from azu.money.endings import pack_ending
from azu.money.ledger.transfers import NodeEnrolled, Release, Reserve, Settle
from azu.money.pricing import divide, possible_shares
from azu.protocol.job import JobEnding

# The part of a charge whose work no node has shown is held under this name.
UNSHOWN = "-"


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
    enrolled, by id. Without a charge all that is reserved goes back.
    """
    prompt_tokens = min(max(0, prompt_tokens), hold.prompt_tokens)
    completion_tokens = min(max(0, completion_tokens), hold.max_tokens)
    charged = hold.price_of(prompt_tokens + completion_tokens)
    if not charged:
        return Release(id=f"release:{hold.job_id}", job_id=hold.job_id, outcome=pack_ending(ending))
    division = divide(charged, hold.platform_percent, work, hold.num_layers)
    # By the terms of now: without them every settlement would read the reservation's entry.
    elapsed_ms = now_ms - (hold.expires_at_ms - terms.reservation_ttl_ms)
    ran = [by_node for layer, by_node in work.items() if 0 <= layer < hold.num_layers]
    speeds = {one: nodes[one].work_bytes_per_s for one in division.workers if one in nodes}
    possible = possible_shares(division.workers, ran, speeds, elapsed_ms)
    shares, held = Counter[str](), Counter[str]()
    for node_id, lamports in possible.items():
        payout = nodes[node_id].payout if node_id in nodes else terms.others_payout
        if payout is None:
            held[node_id] += lamports
        else:
            shares[payout] += lamports
    if unshown := division.held_lamports + sum(division.workers.values()) - sum(possible.values()):
        held[UNSHOWN] += unshown
    return Settle(
        id=f"settle:{hold.job_id}",
        job_id=hold.job_id,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        charged_lamports=charged,
        platform_lamports=division.platform_lamports,
        shares=shares,
        held=held,
        by_node=division.workers,
        maturity_ms=terms.maturity_ms,
        outcome=pack_ending(ending),
    )
