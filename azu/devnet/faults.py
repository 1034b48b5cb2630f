"""Faults between azu and a chain, which tests switch on, and the ASGI middleware that applies them."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, MutableMapping
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Message, Receive, Send], Awaitable[None]]

_PATHS = ("/exchange", "/info", "/explorer")


class FaultKind(StrEnum):
    """The kinds of faults: those down to DELAY hit one answer, those below it change what the chain does."""

    REPLY_DROPPED_BEFORE = "reply_dropped_before"  # the action is not carried out
    REPLY_DROPPED_AFTER = "reply_dropped_after"  # it is carried out, but the answer is lost
    UNPROCESSABLE = "unprocessable"  # 422 in plain text
    RATE_LIMITED = "rate_limited"  # 429 with the body `null`
    SERVER_ERROR_BEFORE = "server_error_before"  # 500, the action is not carried out
    SERVER_ERROR_AFTER = "server_error_after"  # 500, but the action is carried out
    DELAY = "delay"  # the answer takes `seconds` longer
    RESTART = "restart"  # every connection is cut for `seconds`
    ROWS_LATE = "rows_late"  # ledger rows appear `seconds` later, with their own time
    ROWS_TWICE = "rows_twice"
    SAME_TIME = "same_time"  # an action happens in the millisecond of the last one
    SECOND_HYPE = "second_hype"  # another token called HYPE exists from now on


_ANSWER_FAULTS = (
    FaultKind.REPLY_DROPPED_BEFORE,
    FaultKind.REPLY_DROPPED_AFTER,
    FaultKind.SERVER_ERROR_BEFORE,
    FaultKind.SERVER_ERROR_AFTER,
    FaultKind.UNPROCESSABLE,
    FaultKind.RATE_LIMITED,
    FaultKind.DELAY,
)


class Fault(BaseModel):
    """One fault: it hits a request with probability `chance`, at most `times` times (None: no limit).

    A fault that hits an answer hits requests of `path` only.
    """

    model_config = ConfigDict(extra="forbid")

    kind: FaultKind
    path: Literal["/exchange", "/info", "/explorer"] = "/exchange"
    times: int | None = Field(default=1, ge=1)
    chance: float = Field(default=1.0, gt=0, le=1)
    seconds: float = Field(default=0.0, ge=0, le=60)


class Faults:
    """The faults that are switched on."""

    def __init__(self, seed: int | None = None) -> None:
        self._active: list[Fault] = []
        self._random = random.Random(seed)  # noqa: S311

    def add(self, fault: Fault) -> None:
        """Switch a fault on."""
        self._active.append(fault)

    def clear(self) -> None:
        """Switch every fault off."""
        self._active.clear()

    def take(self, *kinds: FaultKind, path: str | None = None) -> Fault | None:
        """Use and return the fault of one of these kinds that hits now, or None; `path` limits the choice."""
        for fault in self._active:
            fits = fault.kind in kinds and path in (None, fault.path)
            if fits and self._random.random() < fault.chance:
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times == 0:
                        self._active.remove(fault)
                return fault
        return None


class FaultyWire:
    """The ASGI middleware that applies the faults that hit an answer."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._cut_until_s = 0.0

    def cut(self, seconds: float) -> None:
        """Cut every connection to the chain for `seconds` from now on."""
        self._cut_until_s = time.monotonic() + seconds

    def wrap(self, app: AsgiApp) -> AsgiApp:
        """Return the app with the faults applied to its answers."""

        async def faulty(scope: Message, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"] in _PATHS:
                await self._forward(app, scope, receive, send)
            else:
                await app(scope, receive, send)

        return faulty

    async def _forward(self, app: AsgiApp, scope: Message, receive: Receive, send: Send) -> None:
        if time.monotonic() < self._cut_until_s:
            await _hang_up(send)
            return
        fault = self._faults.take(*_ANSWER_FAULTS, path=scope["path"])
        match fault.kind if fault else None:
            case FaultKind.REPLY_DROPPED_BEFORE:
                await _hang_up(send)
            case FaultKind.REPLY_DROPPED_AFTER:
                await app(scope, receive, _discard)
                await _hang_up(send)
            case FaultKind.SERVER_ERROR_AFTER:
                await app(scope, receive, _discard)
                await _reply(send, 500, b"Internal Server Error", b"text/plain")
            case FaultKind.SERVER_ERROR_BEFORE:
                await _reply(send, 500, b"Internal Server Error", b"text/plain")
            case FaultKind.RATE_LIMITED:
                await _reply(send, 429, b"null", b"application/json")
            case FaultKind.UNPROCESSABLE:
                await _reply(send, 422, b"Failed to deserialize the JSON body", b"text/plain")
            case FaultKind.DELAY if fault:
                await asyncio.sleep(fault.seconds)
                await app(scope, receive, send)
            case _:
                await app(scope, receive, send)


async def _discard(message: Message) -> None:
    pass


async def _hang_up(send: Send) -> None:
    # The answer announces one byte and never sends it, so the server closes the connection.
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})


async def _reply(send: Send, status: int, body: bytes, content_type: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
