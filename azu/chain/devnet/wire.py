"""The unreliable line in front of the devnet: answers get lost, late or wrong."""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from azu.chain.devnet.faults import FaultKind, Faults

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Message, Receive, Send], Awaitable[None]]

_PATHS = ("/exchange", "/info", "/explorer")


class FaultyWire:
    """ASGI middleware that applies the faults that hit an answer."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._cut_until_s = 0.0

    def cut(self, seconds: float) -> None:
        """Cut every connection to the chain for so long from now on."""
        self._cut_until_s = time.monotonic() + seconds

    def around(self, app: AsgiApp) -> AsgiApp:
        """Return the app behind this line."""

        async def wired(scope: Message, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"] in _PATHS:
                await self._carry(app, scope, receive, send)
            else:
                await app(scope, receive, send)

        return wired

    async def _carry(self, app: AsgiApp, scope: Message, receive: Receive, send: Send) -> None:
        if time.monotonic() < self._cut_until_s:
            await _hang_up(send)
            return
        fault = self._faults.strike(*_HITS_AN_ANSWER, path=scope["path"])
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


_HITS_AN_ANSWER = (
    FaultKind.REPLY_DROPPED_BEFORE,
    FaultKind.REPLY_DROPPED_AFTER,
    FaultKind.SERVER_ERROR_BEFORE,
    FaultKind.SERVER_ERROR_AFTER,
    FaultKind.UNPROCESSABLE,
    FaultKind.RATE_LIMITED,
    FaultKind.DELAY,
)


async def _discard(message: Message) -> None:
    pass


async def _hang_up(send: Send) -> None:
    # An answer that promises a byte and never sends it: the server closes the connection.
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})


async def _reply(send: Send, status: int, body: bytes, content_type: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
