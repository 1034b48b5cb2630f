"""How a test finds the network's actors, runs code in them and learns their process ids."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import ray
from ray import cloudpickle
from ray.actor import ActorHandle

from actors.placement import NAMESPACE

_TIMEOUT_S = 30
_Answer = TypeVar("_Answer")


def actors_named(prefix: str) -> list[ActorHandle]:
    """Return the living actors whose names begin with a prefix, in the order of their names."""
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    return [ray.get_actor(name, namespace=NAMESPACE) for name in sorted(names) if name.startswith(prefix)]


def ask_inside(actor: ActorHandle, question: Callable[[object], _Answer]) -> _Answer:
    """Run a test's function inside an actor; it gets the object that the actor wraps."""
    # By name, the actor would import the test first and answer no call meanwhile.
    cloudpickle.register_pickle_by_value(sys.modules[question.__module__])
    return ray.get(actor.__ray_call__.remote(question), timeout=_TIMEOUT_S)


def pid_of(actor: ActorHandle) -> int:
    """Return an actor's process id."""
    return ask_inside(actor, _own_pid)


def lend(agent: ActorHandle, vram_bytes: int) -> None:
    """Have a node's agent report that it lends more or less memory, at most what the node joined with."""

    def change(agent: object) -> None:
        agent._lent_bytes = min(vram_bytes, agent._node.vram_bytes)

    ask_inside(agent, change)


def _own_pid(_: object) -> int:
    return os.getpid()
