"""What the network shows of its nodes, jobs and books."""

from collections import Counter
from collections.abc import Mapping

from azu import metrics
from azu.metrics import Meter
from azu.money.ledger.transfers import PLATFORM


def show_books(meter: Meter, balances: Mapping[str, int]) -> None:
    """Show what was charged, earned and paid since the books were opened, and what is held for whom.

    Of a charge the platform's account gets one part and workers the rest, and neither ever gives any back:
    what workers earned stands in the three accounts through which it reaches their wallets.
    """
    held: Counter[str] = Counter()
    for account, lamports in balances.items():
        owner, _, rest = account.partition(":")
        if rest:
            held[f"{owner}_{rest.rpartition(':')[2]}"] += lamports
    paid = held.pop("worker_paid", 0)
    earned = held["worker_earned"] + held["worker_paying"] + paid
    meter.raise_counter_to(metrics.LAMPORTS_CHARGED, earned + balances.get(PLATFORM, 0))
    meter.raise_counter_to(metrics.LAMPORTS_EARNED, earned)
    meter.raise_counter_to(metrics.LAMPORTS_PAID, paid)
    meter.set_gauge(metrics.LAMPORTS_HELD, {(account,): lamports for account, lamports in held.items()})
