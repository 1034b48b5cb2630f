"""What the pieces of every model share: the network that they come up in."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from ray.actor import ActorHandle

from azu.config import NetworkPolicy
from azu.protocol.node import Node


@dataclass(frozen=True, slots=True)
class Site:
    """Where models come up: the network's policy, its nodes and their agents by id, the pipelines' Redis.

    `blame` is called with the id of a node that sent a bad frame; `probe` has those of some nodes doubted
    that do not answer.
    """

    policy: NetworkPolicy
    redis_url: str
    agents: Mapping[str, ActorHandle]
    nodes: Mapping[str, Node]
    blame: Callable[[str], None]
    probe: Callable[[Iterable[str]], Awaitable[None]]
