"""What the books show: sums of all accounts, what waits for an admin, and what can be reversed. Pure."""

from collections import Counter
from collections.abc import Mapping

from azu.money.books import HeldMoney, JobDispute, NodesHeldMoney, ReversibleJob, ReversibleJobs, Totals
from azu.money.ledger.state import BooksState
from azu.money.ledger.transfers import PLATFORM, is_node_held, worker_earned

_MOST_REVERSIBLE = 1000


def totals_of(balances: Mapping[str, int], lost_writes: int = 0, revenue_left: int = 0) -> Totals:
    """Return the sums of all accounts' balances.

    Of each charge the platform's account gets one part and workers the rest, and neither gives any back: what
    workers earned stands in the accounts through which it reaches their wallets, or is held. Of the
    platform's part `revenue_left` lamports are not in the account any more.
    """
    held: Counter[str] = Counter()
    for account, lamports in balances.items():
        owner, _, rest = account.partition(":")
        if owner in ("held", "suspense"):
            held[owner] += lamports
        elif rest:
            held[f"{owner}_{rest.rpartition(':')[2]}"] += lamports
    paid = held.pop("worker_paid", 0)
    earned = held["worker_earned"] + held["worker_paying"] + held["held"] + paid
    return Totals(
        charged_lamports=earned + balances.get(PLATFORM, 0) + held["platform_paying"] + revenue_left,
        earned_lamports=earned,
        paid_lamports=paid,
        held_lamports=held,
        sum_lamports=sum(balances.values()),
        lost_writes=lost_writes,
    )


def held_in(state: BooksState) -> HeldMoney:
    """Return the money that waits for an admin's command."""
    nodes = (
        NodesHeldMoney(
            node_id := account.partition(":")[2],
            node.payout if (node := state.nodes.get(node_id)) else None,
            lamports,
            state.free(account),
        )
        for account, lamports in sorted(state.balances.items())
        if is_node_held(account)
    )
    disputes = (JobDispute(job, one.payer, one.lamports) for job, one in state.disputes.items())
    return HeldMoney(tuple(nodes), tuple(disputes), tuple(state.suspense.values()))


def reversible_in(state: BooksState, address: str) -> ReversibleJobs:
    """Return the jobs of an address that can be reversed, the largest first, then the last ones to mature."""
    earned = worker_earned(address)
    found = sorted(
        (
            ReversibleJob(job_id, one.payer, one.matures_at_ms, one.accounts)
            for job_id, one in reversed(state.unmatured.items())
            if address == one.payer or earned in one.accounts
        ),
        key=lambda job: -sum(job.accounts.values()),
    )
    return ReversibleJobs(tuple(found[:_MOST_REVERSIBLE]), max(0, len(found) - _MOST_REVERSIBLE))
