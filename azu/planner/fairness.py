"""Fair shares: among placements of almost the best speed, the owners who earned the least come first."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from azu.errors import InsufficientCapacity
from azu.planner.migration import TopologyChange, change_between
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import Structure
from azu.protocol.topology import Topology

# Owner, by payout address -> lamports that the owner earned for each GiB lent for an hour.
Rates = Mapping[str, float]
NO_RATES: Rates = MappingProxyType({})

# A placement counts as fast as the best one from this part of its tokens per second on.
_AS_FAST = 0.97
# A model moves to owners who earned less than this part of what those earned that it leaves.
_MUCH_LESS = 0.5


def fair_plan(
    structure: Structure, nodes: Sequence[Node], policy: PlanPolicy, rates: Rates, *, epoch: int = 1
) -> Topology:
    """Return a plan within 3% of the best speed, on the nodes of those who earned the least.

    As few owners are taken as give that speed, the least rate first; an owner without a rate earned nothing,
    and ties go to the lower address. Without any rate it is the fastest plan. The same input gives the
    same topology. Raises as `plan` does.
    """
    best = plan(structure, nodes, policy, epoch=epoch)
    alive = [node for node in nodes if node.state is NodeState.ALIVE]
    owners = sorted({node.payout_address for node in alive}, key=lambda one: (rates.get(one, 0.0), one))
    if not any(rates.get(one) for one in owners):
        return best

    as_fast = {len(owners): best}  # a plan takes a second where there are a thousand nodes

    def is_as_fast(count: int) -> bool:
        """Keep the plan on the nodes of the first owners if it is as fast."""
        chosen = set(owners[:count])
        try:
            found = plan(
                structure, [node for node in alive if node.payout_address in chosen], policy, epoch=epoch
            )
        except InsufficientCapacity:
            return False
        if is_fast := found.prediction.tokens_per_s >= _AS_FAST * best.prediction.tokens_per_s:
            as_fast[count] = found
        return is_fast

    # One more owner never makes the best plan slower.
    return as_fast[bisect_left(range(1, len(owners)), True, key=is_as_fast) + 1]


def fairer_placement(
    structure: Structure, current: Topology, nodes: Sequence[Node], policy: PlanPolicy, rates: Rates
) -> TopologyChange | None:
    """Return the change to a placement that is as fast, on nodes of owners who earned much less, or None.

    The free bytes of `nodes` are those without `current`.
    """
    owners = {node.node_id: node.payout_address for node in nodes}
    before = current.vram_bytes_by_node.keys()
    if not before <= owners.keys():
        return None  # a node without a report: its pieces are about to be placed again
    try:
        candidate = fair_plan(structure, nodes, policy, rates, epoch=current.epoch + 1)
    except InsufficientCapacity:
        return None
    after = candidate.vram_bytes_by_node.keys()
    leaving = [rates.get(owners[node_id], 0.0) for node_id in before - after]
    coming = [rates.get(owners[node_id], 0.0) for node_id in after - before]
    if not leaving or not coming or max(coming) >= _MUCH_LESS * max(leaving):
        return None
    return change_between(current, replace(candidate, replica=current.replica))
