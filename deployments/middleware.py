"""What every request passes before its route: an id, an address, limits, and an answer if it fails."""

import asyncio
import math
import re
import secrets
from collections.abc import Sequence

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from azu.auth.peers import PEER_HEADER, UNREAD_HEADER, Network, client_address
from azu.errors import AzuError, InvalidRequest, RequestTooLarge, Unavailable
from azu.logs import log_context
from azu.supervision import as_known_error

HEADER = "x-request-id"
# After a 503 that does not say by itself when the request may succeed.
_RETRY_AFTER_S = 2.0
# A body that takes longer is refused; of more that are on their way at once, the one that began first.
_BODY_S = 30.0
_BODIES_AT_ONCE = 256
_OF_BODIES = {b"content-length", b"transfer-encoding"}
LOOPBACK = "127.0.0.1"
_GIVEN = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class RequestIds:
    """Gives each request an id, the caller's own if it is usable, and answers a failed request with an error.

    The id is in every log line of the request. `echo` writes it into the response too.
    """

    def __init__(self, app: ASGIApp, *, echo: bool) -> None:
        self._app = app
        self._echo = echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on under its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _GIVEN.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        started = False

        async def with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._echo:
                    MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with log_context(request_id=request_id):
            try:
                await self._app(scope, receive, with_id)
            except Exception as error:
                known = as_known_error(error, f"{scope['method']} {scope['path']}")
                if started:
                    raise
                await refusal(known)(scope, receive, with_id)


class ClientAddresses:
    """Gives each request the address of its client, where proxies stand between the two.

    `trusted` are the proxies that the network's owner names. Requests that are `behind` azu's own reverse
    proxy have its header.
    """

    def __init__(self, app: ASGIApp, *, trusted: Sequence[Network], behind: bool) -> None:
        self._app = app
        self._trusted = trusted
        self._behind = behind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with the address of its client."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            peer, port = scope.get("client") or ("", 0)
            if self._behind:
                peer = headers.get(PEER_HEADER, "")
            elif port == 0:
                # uvicorn, in Serve's proxy, believed a header of a client on the loopback.
                peer = LOOPBACK
            forwarded = ",".join(headers.getlist("x-forwarded-for"))
            scope["client"] = (client_address(peer, forwarded, self._trusted), port)
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses a body that is too large, by its header or its bytes, or too slow, before a route reads it.

    Up to `whole_bytes` a body was read by a reverse proxy before its request came: it is only on its way.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, whole_bytes: int = 0) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._whole_bytes = whole_bytes
        self._unread: dict[asyncio.Timeout, None] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body read within the limit."""
        # Any method may have a body, but none has one without saying so.
        if scope["type"] != "http" or not _OF_BODIES & dict(scope["headers"]).keys():
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(_BODY_S) as patience:
                body = await self._read(scope, receive, patience)
        except TimeoutError:
            slow = InvalidRequest("the body took too long to arrive", code="slow_body")
            await refusal(slow)(scope, receive, _closing(send))
            return
        except RequestTooLarge as error:
            await refusal(error)(scope, receive, _closing(send))
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive, patience: asyncio.Timeout) -> bytes:
        declared = dict(scope["headers"]).get(b"content-length", b"")
        num_bytes = int(declared) if declared.isdigit() else 0
        self._check(num_bytes)
        body = bytearray()
        if not 0 < num_bytes <= self._whole_bytes:
            self._unread[patience] = None
        try:
            if len(self._unread) > _BODIES_AT_ONCE:
                self._give_up(next(iter(self._unread)))
            while True:
                message = await receive()
                body += message.get("body", b"")
                self._check(len(body))
                if not message.get("more_body"):
                    return bytes(body)
        finally:
            self._unread.pop(patience, None)

    def _give_up(self, patience: asyncio.Timeout) -> None:
        del self._unread[patience]
        if not patience.expired():
            patience.reschedule(0)

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise RequestTooLarge(f"the body is larger than {self._max_bytes} bytes")


def _closing(send: Send) -> Send:
    """Have the connection end with an answer: its client may send the rest of its body for ever."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update({"connection": "close", UNREAD_HEADER: "1"})
        await send(message)

    return closing


def refusal(error: AzuError, *, is_final: bool = False) -> JSONResponse:
    """Return an error's response.

    OpenAI's clients repeat a request by themselves after 408, 409, 429 and 5xx. `x-should-retry: false` keeps
    them from it where the error `is_final`: the request may have been charged, or harms whatever runs it.
    """
    headers = {}
    wait_s = error.retry_after_s
    if wait_s is None and error.status == Unavailable.status:
        wait_s = _RETRY_AFTER_S
    if wait_s is not None:
        headers["retry-after"] = str(math.ceil(wait_s))
    if is_final:
        headers["x-should-retry"] = "false"
    return JSONResponse(error.to_openai(), error.status, headers)
