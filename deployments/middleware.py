"""What every request passes before its route: an id, limits, and an answer if it fails."""

import asyncio
import math
import re
import secrets
from collections import Counter

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from azu.errors import AzuError, InvalidRequest, RateLimited, RequestTooLarge, Unavailable
from azu.logs import log_context
from azu.supervision import as_known_error

HEADER = "x-request-id"
# After a 503 that does not say by itself when the request may succeed.
_RETRY_AFTER_S = 2.0
_BUSY_S = 1.0
# A body that takes longer is refused; of more that are on their way at once, the one that began first.
_BODY_S = 60.0
_BODIES_AT_ONCE = 256
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


class OpenRequests:
    """Refuses a request while too many are open, in all or of one caller: it would wait without an answer.

    A caller is whatever the request names as its key, valid or not. `/health` is answered always.
    """

    def __init__(self, app: ASGIApp, *, most: int, most_of_one: int) -> None:
        self._app = app
        self._most = most
        self._most_of_one = most_of_one
        self._open: Counter[bytes] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and count it until its answer has ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        caller = dict(scope["headers"]).get(b"authorization", b"")
        if scope["path"] != "/health" and (error := self._refusal(caller)) is not None:
            await refusal(error)(scope, receive, send)
            return
        self._open[caller] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]

    def _refusal(self, caller: bytes) -> AzuError | None:
        if caller and self._open[caller] >= self._most_of_one:
            return RateLimited(
                f"{self._most_of_one} requests of this key are open; wait until one has ended",
                code="too_many_open_requests",
                retry_after_s=_BUSY_S,
            )
        if self._open.total() >= self._most:
            return Unavailable("too many requests are open", code="overloaded", retry_after_s=_BUSY_S)
        return None


class BodyLimit:
    """Refuses a body that is too large, by its header or its bytes, or too slow, before a route reads it."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._unread: dict[asyncio.Timeout, None] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body read within the limit."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(_BODY_S) as patience:
                body = await self._read(scope, receive, patience)
        except TimeoutError:
            slow = InvalidRequest("the body took too long to arrive", code="slow_body")
            await refusal(slow)(scope, receive, send)
            return
        except RequestTooLarge as error:
            await refusal(error)(scope, receive, send)
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
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        self._check(int(declared) if declared.isdigit() else 0)
        body = bytearray()
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


def refusal(error: AzuError, *, may_be_charged: bool = False) -> JSONResponse:
    """Return an error's response.

    OpenAI's clients repeat a request by themselves after 408, 409, 429 and 5xx. `x-should-retry: false` keeps
    them from it where the request may have been charged.
    """
    headers = {}
    wait_s = error.retry_after_s
    if wait_s is None and error.status == Unavailable.status:
        wait_s = _RETRY_AFTER_S
    if wait_s is not None:
        headers["retry-after"] = str(math.ceil(wait_s))
    if may_be_charged:
        headers["x-should-retry"] = "false"
    return JSONResponse(error.to_openai(), error.status, headers)
