"""The FastAPI app: its routes, its contract, and one shape for every error."""

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic.warnings import UnsupportedFieldAttributeWarning
from starlette.exceptions import HTTPException

from azu.api.base import ErrorBody
from azu.auth.peers import WHOLE_BODY_BYTES
from azu.config import ControlConfig
from azu.errors import AzuError, InvalidRequest, NotFound, plain_fault
from azu.jobs.departures import BEAT_S
from azu.metrics import Meter
from azu.supervision import Supervisor, end_process
from deployments import accounts, completions, jobs, network, nodes, page
from deployments.middleware import BodyLimit, ClientAddresses, RequestIds, refusal
from deployments.schema import openapi_of
from deployments.services import Services, warm_up

_GROUPS = {
    "Completions": completions,
    "Jobs": jobs,
    "Accounts": accounts,
    "Network": network,
    "Nodes": nodes,
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "Refused; nothing was changed"},
    "5XX": {"model": ErrorBody, "description": "Not served now"},
}


def build_api(
    config: ControlConfig,
    connect: Callable[[ControlConfig], Services] = Services,
    *,
    echo_ids: bool = True,
    replace: Callable[[], None] = end_process,
) -> FastAPI:
    """Return the ingress as a plain ASGI app; it connects when it starts.

    With `echo_ids` the app writes a request's id into the response; Serve's proxy does that by itself.
    `replace` is called once a loop of the ingress cannot go on.
    """

    @asynccontextmanager
    async def connected(app: FastAPI) -> AsyncIterator[None]:
        services = app.state.services = connect(config)
        loops = Supervisor("ingress", Meter(), replace)
        # An ingress that says no more that it lives has its clients count as gone.
        loops.start("beat", services.intake.departures.beat, every_s=BEAT_S)
        warming = asyncio.create_task(asyncio.to_thread(warm_up))
        yield
        await loops.stop()
        warming.cancel()

    # FastAPI ignores it while it makes a route; a model that is built at its first use warns then.
    warnings.filterwarnings("ignore", category=UnsupportedFieldAttributeWarning)
    api = _with_routes(connected)
    api.add_exception_handler(AzuError, _refused)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(HTTPException, _no_route)
    behind = config.serve_port is not None
    whole_bytes = WHOLE_BODY_BYTES if behind else 0
    api.add_middleware(BodyLimit, max_bytes=config.policy.limits.max_body_bytes, whole_bytes=whole_bytes)
    api.add_middleware(ClientAddresses, trusted=config.trusted_proxies, behind=behind)
    api.add_middleware(RequestIds, echo=echo_ids)
    return api


def contract() -> dict[str, Any]:
    """Return the OpenAPI document of the API; no network is needed."""
    return _with_routes().openapi()


def _with_routes(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None) -> FastAPI:
    api = FastAPI(
        title="azu",
        version=version("azu"),
        lifespan=lifespan,
        # FastAPI's own pages would load scripts from another host; deployments/page serves /docs.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=_REFUSALS,
    )
    api.openapi = lambda: openapi_of(api)  # type: ignore[method-assign]
    for group, routes in _GROUPS.items():
        api.include_router(routes.router, tags=[group])
    api.include_router(page.router)
    return api


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AzuError)
    return refusal(error)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    place, fault = plain_fault(error.errors())
    # The place begins with the part of the request: its body, path or query.
    param = place.partition(".")[2] or None
    return refusal(InvalidRequest(f"{param or 'the body'}: {fault}", param=param))


async def _no_route(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = NotFound if error.status_code == 404 else InvalidRequest
    return JSONResponse(kind(str(error.detail)).to_openai(), error.status_code, error.headers)
