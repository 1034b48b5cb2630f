"""What the network shows of its nodes, jobs and books."""

from collections import Counter
from collections.abc import Iterable, Mapping

from azu.ledger.accounts import PLATFORM
from azu.metrics import catalogue as metrics
from azu.metrics.meter import Labels, Meter
from azu.protocol.node import Node, NodeState


def show_nodes(meter: Meter, nodes: Iterable[Node]) -> None:
    """Show every node's live memory and load, and how many there are in each state."""
    nodes = list(nodes)
    states = Counter(node.state for node in nodes)
    meter.show(metrics.NODES, {(state.value,): states[state] for state in NodeState})
    meter.show(metrics.NODE_VRAM, {(node.name,): node.vram_total_bytes for node in nodes})
    meter.show(metrics.NODE_VRAM_FREE, {(node.name,): node.vram_free_bytes for node in nodes})
    used: dict[Labels, float] = {
        (node.name,): node.vram_used_bytes for node in nodes if node.vram_used_bytes is not None
    }
    meter.show(metrics.NODE_VRAM_USED, used)
    meter.show(metrics.NODE_VRAM_OTHER, {(node.name,): node.vram_other_bytes for node in nodes})
    for node in nodes:
        meter.count(metrics.BAD_FRAMES, 0, node.name)
    meter.show(metrics.NODE_LOAD, {(node.name,): node.load for node in nodes})


def show_jobs(meter: Meter, num_waiting: int, num_running: int) -> None:
    """Show the jobs that have not ended."""
    meter.show(metrics.JOBS, {("waiting",): num_waiting, ("running",): num_running})


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
    meter.reach(metrics.LAMPORTS_CHARGED, earned + balances.get(PLATFORM, 0))
    meter.reach(metrics.LAMPORTS_EARNED, earned)
    meter.reach(metrics.LAMPORTS_PAID, paid)
    meter.show(metrics.LAMPORTS_HELD, {(account,): lamports for account, lamports in held.items()})
