"""The client for programs without an event loop: the calls of AsyncClient, each run to its end."""

import ssl
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, Unpack

from azu.api.jobs import Phase
from azu.api.openai import ChatChoice, TextChoice
from azu.client.client import TIMEOUT_S, AsyncClient, Messages
from azu.client.generation import Choice, Generation
from azu.client.parameters import ChatParameters, TextParameters
from azu.client.stream import AsyncStream, Chunk
from azu.client.wire import blocking, run

P = ParamSpec("P")
T = TypeVar("T")


class Stream(Generic[Choice]):
    """The text of one answer as it comes, and its `result()` at the end: AsyncStream without an event loop.

    A caller that leaves the `with` block early, calls `close()` or is interrupted cancels the job.
    """

    def __init__(self, inner: AsyncStream[Choice]) -> None:
        self._inner = inner

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return run(self._inner.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def job_id(self) -> str:
        """The id of the answer's job, empty before the network has answered."""
        return self._inner.job_id

    @property
    def phase(self) -> Phase | None:
        """Where the job stands while nothing of its answer comes."""
        return self._inner.phase

    @property
    def on_phase(self) -> Callable[[Phase], None] | None:
        """What each new phase is given to."""
        return self._inner.on_phase

    @on_phase.setter
    def on_phase(self, told: Callable[[Phase], None] | None) -> None:
        self._inner.on_phase = told

    def chunks(self) -> Iterator[Chunk]:
        """Yield the rest as it comes: texts of all choices, reasoning, tool calls, log probabilities."""
        chunks = self._inner.chunks()
        while (chunk := run(anext(chunks, None))) is not None:
            yield chunk

    def close(self) -> None:
        """End the stream and its job; a loop in another thread gets the error of a cancelled job."""
        run(self._inner.close())

    def result(self) -> Generation[Choice]:
        """Read the rest of the answer and return it whole."""
        return run(self._inner.result())

    def with_client(self, client: "Client") -> Self:
        """Return the stream, which at its end also closes its client."""
        self._inner.at_end = client.calls.close
        return self


def _run(
    call: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> "Callable[Concatenate[Client, P], T]":
    @wraps(call)
    def called(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run(call(self.calls, *args, **kwargs))

    return called


class _BlockingCalls(AsyncClient):
    _wire_with = staticmethod(blocking)


class Client:
    """A caller of a network's HTTP API, with one pool of connections; `with` closes it at the end.

    The arguments, methods and errors are those of AsyncClient; threads can share a client.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        tls: ssl.SSLContext | None = None,
        platform: str | None = None,
    ) -> None:
        self.calls = _BlockingCalls(base_url, api_key, timeout_s=timeout_s, tls=tls, platform=platform)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The network's URL, without a slash at its end."""
        return self.calls.url

    @property
    def has_key(self) -> bool:
        """Whether the client sends an API key."""
        return self.calls.has_key

    def stream(
        self, prompt: str | Sequence[int], *, model: str, **parameters: Unpack[TextParameters]
    ) -> Stream[TextChoice]:
        """Continue a prompt, a text or token ids, as it is; the text comes as a stream."""
        return Stream(self.calls.stream(prompt, model=model, **parameters))

    def chat_stream(
        self, messages: Messages, *, model: str, **parameters: Unpack[ChatParameters]
    ) -> Stream[ChatChoice]:
        """Answer a question or a chat through the model's own template; the text comes as a stream."""
        return Stream(self.calls.chat_stream(messages, model=model, **parameters))

    api_keys = _run(AsyncClient.api_keys)
    balance = _run(AsyncClient.balance)
    chat = _run(AsyncClient.chat)
    claim_earnings = _run(AsyncClient.claim_earnings)
    close = _run(AsyncClient.close)
    decision = _run(AsyncClient.decision)
    delete_job = _run(AsyncClient.delete_job)
    deposit = _run(AsyncClient.deposit)
    dispute = _run(AsyncClient.dispute)
    earnings = _run(AsyncClient.earnings)
    generate = _run(AsyncClient.generate)
    healthy = _run(AsyncClient.healthy)
    jobs = _run(AsyncClient.jobs)
    leave = _run(AsyncClient.leave)
    login = _run(AsyncClient.login)
    models = _run(AsyncClient.models)
    network = _run(AsyncClient.network)
    offer = _run(AsyncClient.offer)
    pause = _run(AsyncClient.pause)
    platform = _run(AsyncClient.platform)
    quote = _run(AsyncClient.quote)
    receipt = _run(AsyncClient.receipt)
    results = _run(AsyncClient.results)
    resume = _run(AsyncClient.resume)
    revoke_key = _run(AsyncClient.revoke_key)
    shard = _run(AsyncClient.shard)
    signed_receipt = _run(AsyncClient.signed_receipt)
    submit = _run(AsyncClient.submit)
    withdraw = _run(AsyncClient.withdraw)
    withdrawal = _run(AsyncClient.withdrawal)
