"""Layers onto nodes: the fastest cut of the layers into spans, each within its node's memory."""

from collections.abc import Iterator, Sequence

import numpy as np

from azu.planner.demand import Demand
from azu.planner.pool import Pool
from azu.planner.search import Route, Search, search
from azu.planner.spans import SpanCosts

# Nodes around which others are sorted by their links. Beyond this many nodes it is a choice among them.
_MOST_CENTRES = 6


def best_routes(demand: Demand, pool: Pool, *, price_s: float) -> list[Route]:
    """Return the best route of each node order, the very best first.

    `price_s` is what a place for an expert is worth: 0 gives the fastest routes, a high one those that leave
    the most room for experts. Any of them may leave too little.
    """
    searches = _searches(demand, pool, price_s)
    routes = [found.route() for found in searches if found.reach == demand.structure.num_layers]
    return sorted(routes, key=lambda route: float(f"{route.cost:.9e}"))


def longest_route(demand: Demand, pool: Pool) -> Route:
    """Return the route that gets furthest, when none gets to the end."""
    return max(_searches(demand, pool, price_s=0), key=lambda found: found.reach).route()


def _searches(demand: Demand, pool: Pool, price_s: float) -> list[Search]:
    costs = SpanCosts(demand, pool, price_s)
    return [search(demand, pool, costs, order) for order in _orders(pool)]


def _orders(pool: Pool) -> Iterator[Sequence[int]]:
    """Yield orders in which nodes may follow each other in a pipeline.

    Each sorts by what a node is, or by its link to one other, never by its neighbours: one more node leaves
    all routes of the others possible. Where all links are equal, time per token is a sum and the same in
    every order; room at the ends is not.
    """
    by_id = range(len(pool.nodes))
    yield by_id
    yield sorted(by_id, key=lambda node: pool.room_bytes[node])
    yield sorted(by_id, key=lambda node: -pool.room_bytes[node])
    if pool.links_s is not None:
        for centre in by_id[:_MOST_CENTRES]:
            yield [int(node) for node in np.argsort(pool.links_s[centre], kind="stable")]
