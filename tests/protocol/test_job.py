"""A receipt names the node of every piece, stages first."""

from azu.protocol.job import Placement, placements
from azu.protocol.topology import ExpertSet
from tests import builders


def test_stages_come_in_order_and_expert_sets_behind_them() -> None:
    first, second = builders.topology({"a": (0, 2), "b": (2, 4)}).stages
    chosen = ExpertSet(0, "a", {3: (1, 2), 1: (0,)}, 1)
    nodes = {name: builders.node(name, name=f"{name}'s") for name in "ab"}

    lines = placements([(chosen, "expert:0"), (second, "layer:1"), (first, "layer:0")], nodes)

    assert lines == (
        Placement("a's", "layer:0", (0, 2), {}),
        Placement("b's", "layer:1", (2, 4), {}),
        Placement("a's", "expert:0", (1, 1), {3: (1, 2), 1: (0,)}),
    )
