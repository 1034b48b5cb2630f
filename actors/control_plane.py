"""The control plane: registry and scheduler on the head, started again when they die."""

import logging
import time
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.links import REGISTRY, find
from actors.placement import CONTROL, SCHEDULER, release_all, start_on_head
from actors.registry import Registry
from actors.scheduler import Scheduler
from azu.config import ControlConfig

log = logging.getLogger(__name__)

# On a busy machine the imports of an actor take minutes.
_START_TIMEOUT_S = 600.0
# An actor that answered before, and now does not for so long, hangs; one on a busy machine answers before.
_SILENCE_S = 30.0
# Callers that wait for the Hub leave threads for those that read what is here.
_REGISTRY_CONCURRENCY = 64
_SCHEDULER_CONCURRENCY = 1000


def start(config: ControlConfig) -> None:
    """Start what does not run of the control plane in the Ray cluster that this process is connected to."""
    if _found(REGISTRY) is None:
        _start_registry(config)
    scheduler = _found(SCHEDULER)
    started = _start_scheduler(config) if scheduler is None else scheduler.start.remote()
    ray.get(started, timeout=_START_TIMEOUT_S)


def stop() -> None:
    """End the control plane and every actor that it placed, also those of another process."""
    release_all()


@dataclass(frozen=True, slots=True)
class _Question:
    """What an actor was asked last: it hangs if there is no answer at `until_s`."""

    actor: ActorHandle
    answer: ray.ObjectRef
    until_s: float


# By the actor's name: this process watches the control plane of one cluster.
_questions: dict[str, _Question] = {}


def revive(config: ControlConfig) -> list[str]:
    """Start again each actor that died or hangs, and return their names; called once a second.

    Their state is in Redis and in the actors that live on. This waits for no actor.
    """
    revived = []
    if _is_lost(REGISTRY):
        _start_registry(config)
        revived.append(REGISTRY)
    if _is_lost(SCHEDULER):
        _start_scheduler(config)
        revived.append(SCHEDULER)
    return revived


def _start_registry(config: ControlConfig) -> None:
    start_on_head(Registry, REGISTRY, config, max_concurrency=_REGISTRY_CONCURRENCY, has_control=True)


def _start_scheduler(config: ControlConfig) -> ray.ObjectRef:
    scheduler = start_on_head(Scheduler, SCHEDULER, config, max_concurrency=_SCHEDULER_CONCURRENCY)
    return scheduler.start.remote()


def _found(name: str) -> ActorHandle | None:
    try:
        return find(name)
    except ValueError:
        return None


def _is_lost(name: str) -> bool:
    """Say whether an actor died, or hangs and was killed for it; an actor that only starts has its time."""
    actor, question = _found(name), _questions.get(name)
    if actor is None:
        return True
    if question is None or question.actor != actor:
        _questions[name] = _ask(name, actor, _START_TIMEOUT_S)
        return False
    ready, _ = ray.wait([question.answer], timeout=0)
    if not ready:
        if time.monotonic() < question.until_s:
            return False
        log.error("the %s does not answer: it is replaced", name)
        ray.kill(actor)
        return True
    try:
        ray.get(ready)
    except RayError as error:
        # One that died is noticed a second later.
        log.warning("the %s did not start", name, exc_info=error)
    _questions[name] = _ask(name, actor, _SILENCE_S)
    return False


def _ask(name: str, actor: ActorHandle, timeout_s: float) -> _Question:
    """Ask for a start, which changes nothing unless the first one failed."""
    group = CONTROL if name == REGISTRY else None
    answer = actor.start.options(concurrency_group=group).remote()
    return _Question(actor, answer, time.monotonic() + timeout_s)
