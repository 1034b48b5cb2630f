"""What every request passes before its route: an id, a limit for its body, and an answer if it fails."""

import math
import re
import secrets

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from azu.errors import AzuError, RequestTooLarge, Unavailable
from azu.logs import log_context
from azu.supervision import as_known_error

HEADER = "x-request-id"
# After a 503 that does not say by itself when the request may succeed.
_RETRY_AFTER_S = 2.0
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


class BodyLimit:
    """Refuses a body that is larger than the limit, by its header or its bytes, before a route reads it."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body read within the limit."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        body = await self._read(scope, receive)
        if body is None:
            error = RequestTooLarge(f"the body is larger than {self._max_bytes} bytes")
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

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            return None
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return None
            if not message.get("more_body"):
                return bytes(body)


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
