"""Calls between actors over Ray: to the next stage, to expert sets, and to the control plane by name."""

import asyncio
import functools
import inspect
import queue
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from actors.placement import CONTROL, NAMESPACE
from azu.cluster.liveness import UnansweredCall
from azu.engine.step_check import check_progress
from azu.errors import AzuError, DeadlineExceeded, FrameError, Unavailable, WorkerLost
from azu.supervision import Supervisor, as_known_error

REGISTRY = "registry"
_Class = TypeVar("_Class", bound=type)
_Sent = tuple[ray.ObjectRef, float]  # a call and when it was made
# Longer than the registry or the scheduler takes from its death until it answers again.
_BACK_IN_S = 20.0
_RETRY_S = 0.2


def raises_known_errors(cls: _Class) -> _Class:
    """Have an actor's public methods raise AzuErrors only; of any other exception its callers get the id."""
    for name, method in list(vars(cls).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(cls, name, _raising_known_errors(method, f"{cls.__name__}.{name}"))
    return cls


def _raising_known_errors(method: Any, name: str) -> Any:
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def answer(*arguments: Any, **named: Any) -> Any:
            try:
                return await method(*arguments, **named)
            except Exception as error:
                raise as_known_error(error, name) from None

    else:

        @functools.wraps(method)
        def answer(*arguments: Any, **named: Any) -> Any:
            try:
                return method(*arguments, **named)
            except Exception as error:
                raise as_known_error(error, name) from None

    return answer


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


def get_from_piece(ref: ray.ObjectRef, piece: ActorHandle | None, timeout_s: float, what: str) -> object:
    """Return a call's answer, as long as the piece that was called may still give it.

    It is asked how far it is after each `timeout_s`. Raises DeadlineExceeded when it does not say so, or has
    not got the call; what is no piece must answer in time.
    """
    call = UnansweredCall()
    while True:
        try:
            return get(ref, timeout_s, what)
        except DeadlineExceeded:
            if piece is None:
                raise
            asking = piece.ping.options(concurrency_group=CONTROL).remote(0.0)
            if call.is_lost(check_progress(get(asking, timeout_s, what))):
                raise


async def answer_from_piece(ref: ray.ObjectRef, piece: ActorHandle, timeout_s: float, what: str) -> object:
    """Wait for a call's answer as `get_from_piece` does."""
    call, answer = UnansweredCall(), asyncio.ensure_future(ref)
    try:
        while True:
            await asyncio.wait({answer}, timeout=timeout_s)
            if answer.done():
                return answer.result()
            asking = piece.ping.options(concurrency_group=CONTROL).remote(0.0)
            if call.is_lost(check_progress(await asyncio.wait_for(asking, timeout_s))):
                raise DeadlineExceeded(f"{what} did not answer in time")
    finally:
        answer.cancel()


@dataclass(frozen=True, slots=True)
class PendingCall:
    """An expert call on its way; `waiting` is entered while it is waited for."""

    ref: ray.ObjectRef
    piece: ActorHandle
    what: str
    waiting: Callable[[], AbstractContextManager[None]]

    def result(self, timeout_s: float) -> bytes:
        """Wait for the experts' answer."""
        with self.waiting():
            answer = get_from_piece(self.ref, self.piece, timeout_s, self.what)
        if not isinstance(answer, bytes):
            raise FrameError(f"{self.what} answered with a {type(answer).__name__}")
        return answer


class RayExpertLink:
    """Calls expert sets by index."""

    def __init__(
        self, expert_sets: Mapping[int, ActorHandle], waiting: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._expert_sets = expert_sets
        self._waiting = waiting

    def start(self, expert_set: int, layer: int, request: bytes) -> PendingCall:
        """Send token slices to an expert set without waiting."""
        piece = self._expert_sets[expert_set]
        ref = piece.run.remote(layer, request)
        return PendingCall(ref, piece, f"expert set {expert_set}", self._waiting)


class Acknowledgements:
    """Watches sent calls in a thread of its own, so that a stage never waits for the next one.

    `answered` is called with the seconds that a call took and what it returned.
    """

    def __init__(
        self,
        what: str,
        piece: ActorHandle | None,
        timeout_s: float,
        lost: Callable[[AzuError], None],
        answered: Callable[[float, object], None],
        supervisor: Supervisor,
    ) -> None:
        self._what = what
        self._piece = piece
        self._timeout_s = timeout_s
        self._lost = lost
        self._answered = answered
        self._sent: queue.SimpleQueue[_Sent | None] = queue.SimpleQueue()
        self._awaited: _Sent | None = None
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
        """Wait for one answer; False when there is nothing to wait for any more.

        A call that follows one that raised waits for the same answer.
        """
        self._awaited = self._awaited or self._sent.get()
        if self._closed or self._awaited is None:
            return False
        ref, sent_s = self._awaited
        try:
            answer = get_from_piece(ref, self._piece, self._timeout_s, self._what)
        except AzuError as error:
            if not self._closed:
                self._lost(error)
            answer = None
        self._awaited = None
        if answer is not None:
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


# The actors that answered last. A look-up for each call would wait behind the prompts that threads encode.
_found: dict[str, ActorHandle] = {}


class _Away(Unavailable):
    """An actor is not up, or died during a call."""


async def _ask(name: str, method: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
    try:
        if name not in _found:
            # A look-up calls Ray's head and blocks.
            _found[name] = await asyncio.to_thread(find, name)
        return await asyncio.wait_for(getattr(_found[name], method).remote(*arguments), timeout_s)
    except (ValueError, RayActorError) as error:
        _found.pop(name, None)
        raise _Away(f"the {name} is not up") from error
    except Exception as error:
        raise as_azu_error(error, f"the {name}") from error
