"""The control plane: registry and scheduler on the head, started again when they die."""

import logging

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.links import REGISTRY, find
from actors.placement import SCHEDULER, release_all, start_on_head
from actors.registry import Registry
from actors.scheduler import Scheduler
from azu.config import ControlConfig

log = logging.getLogger(__name__)

# On a busy machine the imports of an actor take minutes.
_START_TIMEOUT_S = 600.0
# An actor that does not answer for so long hangs; one on a busy machine answers before.
_SILENCE_S = 30.0
# Callers that wait for the Hub leave threads for those that read what is here.
_REGISTRY_CONCURRENCY = 64
_SCHEDULER_CONCURRENCY = 1000


def start(config: ControlConfig) -> None:
    """Start what does not run of the control plane in the Ray cluster that this process is connected to."""
    if _is_gone(REGISTRY):
        _start_registry(config)
    started = _start_scheduler(config) if _is_gone(SCHEDULER) else find(SCHEDULER).start.remote()
    ray.get(started, timeout=_START_TIMEOUT_S)


def stop() -> None:
    """End the control plane and every actor that it placed, also those of another process."""
    release_all()


def revive(config: ControlConfig) -> list[str]:
    """Start again each actor that died or hangs, and return their names; called once a second.

    Their state is in Redis and in the actors that live on.
    """
    revived = []
    if _is_gone(REGISTRY):
        _start_registry(config)
        revived.append(REGISTRY)
    if _is_gone(SCHEDULER) or _is_silent(SCHEDULER):
        _start_scheduler(config)
        revived.append(SCHEDULER)
    return revived


def _start_registry(config: ControlConfig) -> None:
    start_on_head(Registry, REGISTRY, config, max_concurrency=_REGISTRY_CONCURRENCY)


def _start_scheduler(config: ControlConfig) -> ray.ObjectRef:
    scheduler = start_on_head(Scheduler, SCHEDULER, config, max_concurrency=_SCHEDULER_CONCURRENCY)
    return scheduler.start.remote()


def _is_gone(name: str) -> bool:
    try:
        find(name)
    except ValueError:
        return True
    return False


def _is_silent(name: str) -> bool:
    """Say whether an actor hangs; it is killed then. One that dies meanwhile is noticed a second later."""
    actor = find(name)
    try:
        # Changes nothing unless its first start failed.
        ray.get(actor.start.remote(), timeout=_SILENCE_S)
    except GetTimeoutError:
        ray.kill(actor)
        return True
    except RayError as error:
        log.warning("the %s did not start", name, exc_info=error)
    return False
