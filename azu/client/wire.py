"""The HTTP client under each call, for programs with an event loop and for those that wait without one."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wire:
    """A pooled HTTP client, and how its program waits; inside `unbroken` nothing cancels a call."""

    http: httpx.AsyncClient
    sleep: Callable[[float], Awaitable[None]]
    unbroken: Callable[[], AbstractContextManager[object]]


def waiting(**settings: Any) -> Wire:
    """Return a wire for an event loop of asyncio or trio; the settings are those of httpx's clients."""
    # It loads asyncio.
    from anyio import CancelScope, sleep

    return Wire(httpx.AsyncClient(**settings), sleep, lambda: CancelScope(shield=True))


def blocking(**settings: Any) -> Wire:
    """Return a wire that waits inside each call, so that `run` runs one to its end without a loop."""
    http = httpx.Client(**settings)

    async def sleep(seconds: float) -> None:
        time.sleep(seconds)

    # The client below has timeouts and certificates; the one above only makes the requests.
    above = {name: value for name, value in settings.items() if name != "verify"}
    return Wire(httpx.AsyncClient(transport=_Blocking(http), **above), sleep, nullcontext)


def run(call: Awaitable[T]) -> T:
    """Return what a call over a blocking wire returns."""
    try:
        next(iter(call.__await__()))
    except StopIteration as end:
        found: T = end.value
        return found
    raise AssertionError("a call over a blocking wire waits for an event loop")


class _Blocking(httpx.AsyncBaseTransport):
    """Sends requests through a client that blocks."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return the response, of which only the head was read."""
        response = self._http.send(request, stream=True)
        return httpx.Response(response.status_code, headers=response.headers, stream=_Body(response))

    async def aclose(self) -> None:
        """Close the connections."""
        self._http.close()


class _Body(httpx.AsyncByteStream):
    """The body of a response, read as it is asked for."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._response.iter_raw():
            yield piece

    async def aclose(self) -> None:
        """Let the connection go."""
        self._response.close()
