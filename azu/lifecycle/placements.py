"""A receipt's lines: which node ran what in which actor."""

from collections.abc import Iterable, Mapping

from azu.protocol.job import Placement
from azu.protocol.node import Node
from azu.protocol.topology import ExpertSet, Stage


def placements(
    pieces: Iterable[tuple[Stage | ExpertSet, str]], nodes: Mapping[str, Node]
) -> tuple[Placement, ...]:
    """Return a line for each piece and its actor's name: stages in order, then expert sets."""
    ordered = sorted(pieces, key=lambda one: (isinstance(one[0], ExpertSet), one[0].index))
    return tuple(
        Placement(node=nodes[what.node_id].name, actor=actor, layers=_layers(what), experts=what.experts)
        for what, actor in ordered
    )


def _layers(what: Stage | ExpertSet) -> tuple[int, int]:
    """Return the span of layers that a piece runs; an expert set runs none of them whole."""
    if isinstance(what, Stage):
        return what.span.start, what.span.end
    return min(what.experts), min(what.experts)
