"""The control plane: registry and scheduler on the head."""

import ray
from ray.actor import ActorHandle

from actors.placement import NAMESPACE, SCHEDULER, release_all, start_on_head
from actors.registry import Registry
from actors.scheduler import Scheduler
from azu.config import ControlConfig

REGISTRY = "registry"
_START_TIMEOUT_S = 60.0


def start(config: ControlConfig) -> None:
    """Start the control plane in the Ray cluster that this process is connected to."""
    registry = start_on_head(Registry, REGISTRY, config, max_concurrency=16)
    scheduler = start_on_head(Scheduler, SCHEDULER, config, registry, max_concurrency=1000)
    ray.get(scheduler.start.remote(), timeout=_START_TIMEOUT_S)


def stop() -> None:
    """Take down the control plane and all that it placed, whoever started it."""
    release_all()


def find(name: str) -> ActorHandle:
    """Return an actor of the control plane by name; ValueError when it is not up."""
    return ray.get_actor(name, namespace=NAMESPACE)
