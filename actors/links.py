"""Calls between actors over Ray: to the next stage, to expert sets, and to the control plane by name."""

import asyncio
import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from actors.placement import NAMESPACE
from azu.errors import AzuError, DeadlineExceeded, Unavailable, WorkerLost
from azu.supervision import Supervisor, as_known_error

REGISTRY = "registry"
# Longer than the registry or the scheduler takes from its death until it answers again.
_BACK_IN_S = 20.0
_RETRY_S = 0.2


def get(ref: ray.ObjectRef, timeout_s: float, what: str) -> object:
    """Return a call's answer; an error of Ray's becomes an AzuError that names `what` was called."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except Exception as error:
        raise as_azu_error(error, what) from error


def as_azu_error(error: Exception, what: str) -> AzuError:
    """Return the AzuError for an exception that a call to another actor raised."""
    # Ray raises a class made of its own and the cause's: the cause alone is what the actor raised.
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, AzuError):
        return cause
    if isinstance(error, GetTimeoutError | TimeoutError):
        return DeadlineExceeded(f"{what} did not answer in time")
    if isinstance(error, RayActorError):
        return WorkerLost(f"{what} is gone")
    return as_known_error(error, what)


@dataclass(frozen=True, slots=True)
class PendingCall:
    """An expert call on its way."""

    ref: ray.ObjectRef
    what: str

    def result(self, timeout_s: float) -> bytes:
        """Wait for the experts' answer."""
        answer = get(self.ref, timeout_s, self.what)
        assert isinstance(answer, bytes)
        return answer


class RayExpertLink:
    """Calls expert sets by index."""

    def __init__(self, expert_sets: Mapping[int, ActorHandle]) -> None:
        self._expert_sets = expert_sets

    def start(self, expert_set: int, layer: int, request: bytes) -> PendingCall:
        """Send token slices to an expert set without waiting."""
        ref = self._expert_sets[expert_set].run.remote(layer, request)
        return PendingCall(ref, f"expert set {expert_set}")


class Acknowledgements:
    """Watches sent calls in a thread of its own, so that a stage never waits for the next one.

    `answered` is called with the seconds that a call took and what it returned.
    """

    def __init__(
        self,
        what: str,
        timeout_s: float,
        lost: Callable[[AzuError], None],
        answered: Callable[[float, object], None],
        supervisor: Supervisor,
    ) -> None:
        self._what = what
        self._timeout_s = timeout_s
        self._lost = lost
        self._answered = answered
        self._sent: queue.SimpleQueue[tuple[ray.ObjectRef, float] | None] = queue.SimpleQueue()
        self._closed = False
        supervisor.start_thread("acknowledgements", self._watch)

    def expect(self, ref: ray.ObjectRef) -> None:
        """Watch one more call; calls are answered in the order they were sent."""
        self._sent.put((ref, time.perf_counter()))

    def close(self) -> None:
        """Watch no longer; calls that are still on their way are forgotten."""
        self._closed = True
        self._sent.put(None)

    def _watch(self) -> bool:
        """Wait for one answer; False when there is nothing to wait for any more."""
        sent = self._sent.get()
        if self._closed or sent is None:
            return False
        ref, sent_s = sent
        try:
            answer = get(ref, self._timeout_s, self._what)
        except AzuError as error:
            if not self._closed:
                self._lost(error)
        else:
            self._answered(time.perf_counter() - sent_s, answer)
        return True


def find(name: str) -> ActorHandle:
    """Return an actor of the control plane by name; ValueError when it is not up."""
    return ray.get_actor(name, namespace=NAMESPACE)


async def ask(
    name: str, method: str, *arguments: Any, timeout_s: float, back_in_s: float = _BACK_IN_S
) -> Any:
    """Call an actor of the control plane; one that is away is called again once it is back.

    The call must be one that may be made twice. Raises Unavailable while the actor is away.
    """
    waiting = AsyncRetrying(
        retry=retry_if_exception_type(_Away),
        stop=stop_after_delay(back_in_s),
        wait=wait_fixed(_RETRY_S),
        reraise=True,
    )
    return await waiting(_ask, name, method, arguments, timeout_s)


class _Away(Unavailable):
    """An actor is not up, or died during a call."""


async def _ask(name: str, method: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
    try:
        # A look-up calls Ray's head and blocks.
        handle = await asyncio.to_thread(find, name)
        return await asyncio.wait_for(getattr(handle, method).remote(*arguments), timeout_s)
    except (ValueError, RayActorError) as error:
        raise _Away(f"the {name} is not up") from error
    except Exception as error:
        raise as_azu_error(error, f"the {name}") from error
