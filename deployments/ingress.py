"""The FastAPI app: routes, one shape for every error, a limit on every body."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from azu.config import ControlConfig
from azu.errors import AzuError, InternalError, InvalidRequest, NotFound, RequestTooLarge
from deployments import accounts, completions, jobs, keys, metrics, network, quotes, receipts, withdrawals
from deployments.services import Services, warm_up

log = logging.getLogger(__name__)


def build_api(config: ControlConfig) -> FastAPI:
    """Return the ingress as a plain ASGI app; it connects when it starts."""

    @asynccontextmanager
    async def connected(app: FastAPI) -> AsyncIterator[None]:
        app.state.services = Services(config)
        warming = asyncio.create_task(asyncio.to_thread(warm_up))
        yield
        warming.cancel()

    api = FastAPI(title="azu", lifespan=connected)
    for routes in (accounts, completions, jobs, keys, metrics, network, quotes, receipts, withdrawals):
        api.include_router(routes.router)
    api.add_exception_handler(AzuError, _refused)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(HTTPException, _no_route)
    api.add_exception_handler(Exception, _broken)
    api.add_middleware(BodyLimit, max_bytes=config.policy.limits.max_body_bytes)
    return api


class BodyLimit:
    """Refuses a body that is larger than the limit, said or sent, before anything reads it."""

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
            await JSONResponse(error.to_openai(), error.status)(scope, receive, send)
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
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said) > self._max_bytes:
            return None
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return None
            if not message.get("more_body"):
                return bytes(body)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AzuError)
    return JSONResponse(error.to_openai(), error.status)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(place) or None
    refused = InvalidRequest(f"{param or 'the body'}: {first['msg']}", param=param)
    return JSONResponse(refused.to_openai(), refused.status)


async def _no_route(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = NotFound if error.status_code == 404 else InvalidRequest
    return JSONResponse(kind(str(error.detail)).to_openai(), error.status_code)


async def _broken(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    internal = InternalError("azu failed to serve this request")
    return JSONResponse(internal.to_openai(), internal.status)
