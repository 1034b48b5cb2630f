"""Calls between azu's processes on one machine: a server on the loopback, and its clients.

The verbs are the asynchronous methods of a class that both sides import. Its annotations say what crosses;
pydantic checks the arguments, and the answer, where they arrive. A connection begins with a proof by each of
the two that it knows the caller's secret, which itself never crosses: a process that listens at the port in
the server's place learns nothing. Then frames cross, each a length, a line of two words and JSON: of a
call its number, the verb and the arguments; of what comes back, in any order, the number, "answer" or
"error", and either.
"""

import asyncio
import hashlib
import hmac
import inspect
import logging
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic_core import to_json
from typing_extensions import TypedDict

from azu.contact import Contact
from azu.errors import (
    AzuError,
    ConfigurationError,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
    error_classes,
    plain_fault,
)
from azu.files import write_private
from azu.supervision import as_known_error
from azu.units import KIB, MIB

_LOG = logging.getLogger(__name__)
_HOST = "127.0.0.1"
_LENGTH = struct.Struct(">I")
_MAX_FRAME_BYTES = 16 * MIB
_MAX_GREETING_BYTES = KIB
_GREETING_S = 2.0
# Of each caller, and of those together that have not proved yet who they are, where the oldest has to go: no
# caller keeps another out.
_MAX_CONNECTIONS = 64
_UNKNOWN = ""
# The longest calls are settlements: for each layer the nodes that ran it, or its experts.
_MAX_CALL_BYTES = 2 * MIB
# Of one connection, calls and their bytes together; the server reads no further call until others have ended.
_MAX_IN_FLIGHT = 256
_MAX_IN_FLIGHT_BYTES = 2 * _MAX_CALL_BYTES
_SECRET_BYTES = 32
# How long a call tries to reach a server that does not listen, and the pauses between two tries.
_REACHED_IN_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
_LOST = (OSError, EOFError)


@dataclass(frozen=True, slots=True)
class Access:
    """The port at which a process listens on this machine, and the secret of each of its callers."""

    __pydantic_config__ = ConfigDict(extra="forbid", hide_input_in_errors=True)

    port: int
    secrets: Mapping[str, str] = field(repr=False)

    @classmethod
    def new(cls, port: int, callers: Iterable[str]) -> "Access":
        """Return an access with new secrets."""
        return cls(port, {caller: secrets.token_urlsafe(_SECRET_BYTES) for caller in callers})

    @classmethod
    def read(cls, path: Path) -> "Access":
        """Read the file of `write`; raises NotFound, ConfigurationError for a damaged one."""
        try:
            return _ACCESS.validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise NotFound(f"there is no {path}: no network ever ran there") from error
        except (OSError, ValidationError) as error:
            raise ConfigurationError(f"{path} cannot be read, or is damaged") from error

    def write(self, path: Path) -> None:
        """Write a file that only its owner can read."""
        write_private(path, _ACCESS.dump_json(self).decode())

    def url(self, caller: str) -> str:
        """Return the URL, with the secret, for one caller."""
        return f"wire://{caller}:{self.secrets[caller]}@{_HOST}:{self.port}"


_ACCESS = TypeAdapter(Access)


@dataclass(frozen=True, slots=True)
class _Verb:
    """What crosses in a call of one method."""

    signature: inspect.Signature
    arguments: TypeAdapter[dict[str, Any]]
    answer: TypeAdapter[Any]


@cache
def _verbs(calls: type) -> Mapping[str, _Verb]:
    """Return the verbs of a class by their names."""
    methods = {name: one for name, one in vars(calls).items() if inspect.iscoroutinefunction(one)}
    return {name: _verb(name, method) for name, method in methods.items()}


def _verb(name: str, method: Callable[..., Any]) -> _Verb:
    crossing = get_type_hints(method, include_extras=True)
    answer = crossing.pop("return")
    checked = with_config(ConfigDict(extra="forbid"))(TypedDict(name, crossing))  # type: ignore[operator]
    return _Verb(inspect.signature(method), TypeAdapter(checked), TypeAdapter(answer))


class WireServer:
    """Serves the verbs of `calls` by the methods of `implementation`, to each caller those it is allowed."""

    def __init__(
        self,
        calls: type,
        implementation: object,
        caller_secrets: Mapping[str, str],
        allowed: Mapping[str, frozenset[str]],
    ) -> None:
        self._verbs: dict[str, tuple[_Verb, object]] = {}
        self.serve(calls, implementation)
        self._secrets = caller_secrets
        self._allowed = allowed
        self._connected: dict[str, dict[asyncio.StreamWriter, None]] = {
            caller: {} for caller in (*caller_secrets, _UNKNOWN)
        }
        self._running: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    def serve(self, calls: type, implementation: object) -> None:
        """Serve the verbs of another class too."""
        self._verbs |= {name: (verb, implementation) for name, verb in _verbs(calls).items()}

    async def start(self, port: int = 0) -> int:
        """Listen at a port of the loopback, a free one for 0; return it."""
        assert set().union(*self._allowed.values()) <= self._verbs.keys(), "each verb is one of the calls"
        self._server = await asyncio.start_server(self._serve, _HOST, port)
        listens_at: int = self._server.sockets[0].getsockname()[1]
        return listens_at

    async def close(self) -> None:
        """Listen no more, and end every connection once the calls that run have ended."""
        if self._server is not None:
            self._server.close()
        await asyncio.gather(*self._running, return_exceptions=True)
        for connected in self._connected.values():
            for writer in connected:
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with self._counted(_UNKNOWN, writer):
                async with asyncio.timeout(_GREETING_S):
                    caller = await self._greet(reader, writer)
            if caller is None:
                return
            if len(self._connected[caller]) >= _MAX_CONNECTIONS:
                _LOG.warning("refused %s, which has %d connections", caller, _MAX_CONNECTIONS)
                return
            with self._counted(caller, writer):
                await self._answer_all(caller, reader, writer)
        except (*_LOST, TimeoutError):
            pass  # the caller has left
        except ValueError as error:
            _LOG.warning("a connection is closed: %s", error)
        finally:
            writer.close()

    @contextmanager
    def _counted(self, caller: str, writer: asyncio.StreamWriter) -> Iterator[None]:
        connected = self._connected[caller]
        if len(connected) >= _MAX_CONNECTIONS:
            next(iter(connected)).close()
        connected[writer] = None
        try:
            yield
        finally:
            del connected[writer]

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str | None:
        """Return the caller's name once it has proved that it knows its secret; None if it does not."""
        caller, their_nonce, _ = await _read(reader, _MAX_GREETING_BYTES)
        secret = self._secrets.get(caller)
        if secret is None:
            _LOG.warning("refused a caller that is not known")
            return None
        nonce = secrets.token_hex(_SECRET_BYTES)
        writer.write(_frame(nonce, _proof(secret, "server", their_nonce, nonce)))
        _, proof, _ = await _read(reader, _MAX_GREETING_BYTES)
        if not hmac.compare_digest(proof, _proof(secret, "caller", their_nonce, nonce)):
            _LOG.warning("refused %s, which does not know its secret", caller)
            return None
        return caller

    async def _answer_all(
        self, caller: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        in_flight, writing = _InFlight(), asyncio.Lock()
        while True:
            size = await _read_size(reader, _MAX_CALL_BYTES)
            await in_flight.begin(size)
            number, verb, arguments = await _read_text(reader, size)
            task = asyncio.create_task(self._answer(caller, writer, writing, number, verb, arguments))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            task.add_done_callback(partial(in_flight.end, size))

    async def _answer(
        self,
        caller: str,
        writer: asyncio.StreamWriter,
        writing: asyncio.Lock,
        number: str,
        verb: str,
        arguments: bytes,
    ) -> None:
        try:
            answer = await self._call(caller, verb, arguments)
        except Exception as error:
            answer = as_known_error(error, f"the call of {verb}")
        # One answer after the other: no more than one lies here as bytes.
        async with writing:
            with suppress(*_LOST):  # the caller has left, and asks again
                writer.write(_answer_frame(number, answer))
                await writer.drain()

    async def _call(self, caller: str, verb: str, arguments: bytes) -> Any:
        if verb not in self._allowed[caller]:
            raise Forbidden(f"{verb} is no call of the {caller}")
        served, implementation = self._verbs[verb]
        try:
            checked = served.arguments.validate_json(arguments)
        except ValidationError as error:
            place, fault = plain_fault(error.errors(include_input=False))
            raise InvalidRequest(f"{verb}, {place}: {fault}", param=place) from error
        return await getattr(implementation, verb)(**checked)


class Remote:
    """A client of a WireServer: each verb of `calls` is one of its methods, unless it has its own.

    A call raises Unavailable when the server answered no call of this process for `silence_s`, or cannot be
    reached for as long. It may have been carried out then, and after a lost connection it is made again:
    every verb has to be safe to repeat.
    """

    def __init_subclass__(cls, calls: type) -> None:
        super().__init_subclass__()
        for name, verb in _verbs(calls).items():
            if name not in vars(cls):
                setattr(cls, name, _method(name, verb))

    def __init__(self, url: str, contact: Contact, *, silence_s: float) -> None:
        place = urlsplit(url)
        if place.scheme != "wire" or None in (place.username, place.password, place.port):
            raise ConfigurationError("this is no URL of a process of azu")
        self._place = place
        self._contact = contact
        self._silence_s = silence_s
        self._opening: asyncio.Task[_Connected] | None = None

    def problem(self) -> str | None:
        """Say since when the server is away from this process; None while it answers."""
        return self._contact.problem()

    async def close(self) -> None:
        """Close the connection."""
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.cancel()
            for connected in await asyncio.gather(opening, return_exceptions=True):
                if isinstance(connected, _Connected):
                    connected.close()

    async def _ask(self, name: str, verb: _Verb, arguments: Mapping[str, Any]) -> Any:
        try:
            async with self._contact.unless_silent(self._silence_s):
                kind, content = await self._insist(name, to_json(arguments))
        except (*_LOST, TimeoutError) as error:
            raise self._contact.fails(error) from error
        if kind == _ERROR:
            raise _error(content)
        return verb.answer.validate_json(content)

    async def _insist(self, verb: str, arguments: bytes) -> tuple[str, bytes]:
        """Make a call until it is answered; raises what kept it from the server."""
        pause_s, until_s = _FIRST_PAUSE_S, time.monotonic() + min(_REACHED_IN_S, self._silence_s)
        while True:
            try:
                answered = await (await self._connection()).ask(verb, arguments)
            except _LOST:
                if time.monotonic() + pause_s > until_s:
                    raise
            else:
                self._contact.answers()
                return answered
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _connection(self) -> "_Connected":
        """Return the connection, which all calls share; raises OSError or EOFError where there is none."""
        opening = self._opening
        if opening is None or (opening.done() and (opening.exception() or opening.result().is_lost)):
            opening = self._opening = asyncio.create_task(_open(self._place))
        return await asyncio.shield(opening)


def _method(name: str, verb: _Verb) -> Callable[..., Any]:
    async def call(self: Remote, *values: Any, **named: Any) -> Any:
        bound = verb.signature.bind(self, *values, **named)
        bound.apply_defaults()
        _, *arguments = bound.arguments.items()
        return await self._ask(name, verb, dict(arguments))

    call.__name__ = name
    return call


async def _open(place: Any) -> "_Connected":
    """Connect, and prove to each other that both know the secret; raises OSError, also for another server."""
    try:
        async with asyncio.timeout(_GREETING_S):
            try:
                reader, writer = await asyncio.open_connection(place.hostname, place.port)
            except OSError as error:
                raise ConnectionRefusedError("it does not listen") from error
            nonce = secrets.token_hex(_SECRET_BYTES)
            writer.write(_frame(place.username, nonce))
            their_nonce, proof, _ = await _read(reader, _MAX_GREETING_BYTES)
            if not hmac.compare_digest(proof, _proof(place.password, "server", nonce, their_nonce)):
                writer.close()
                raise ConnectionRefusedError("another process listens in its place, or it has new secrets")
            writer.write(_frame(place.username, _proof(place.password, "caller", nonce, their_nonce)))
    except ValueError as error:
        raise ConnectionRefusedError("another process listens in its place") from error
    except EOFError as error:
        raise ConnectionRefusedError("it refused the connection") from error
    return _Connected(reader, writer)


class _Connected:
    """One connection of a client, and the calls that wait for an answer over it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._number = 0
        self._waiting: dict[str, asyncio.Future[tuple[str, bytes]]] = {}
        self.is_lost = False
        self._task = asyncio.create_task(self._read_all(reader))

    async def ask(self, verb: str, arguments: bytes) -> tuple[str, bytes]:
        """Return which kind of answer came, and its content; raises OSError where the connection ends."""
        if self.is_lost:
            raise ConnectionResetError("the connection was lost")
        self._number += 1
        number = str(self._number)
        answer: asyncio.Future[tuple[str, bytes]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._writer.write(_frame(number, verb, arguments, _MAX_CALL_BYTES))
            return await answer
        finally:
            del self._waiting[number]

    def close(self) -> None:
        """End the connection."""
        self._task.cancel()
        self._writer.close()

    async def _read_all(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                number, kind, content = await _read(reader, _MAX_FRAME_BYTES)
                if (waits := self._waiting.get(number)) is not None and not waits.done():
                    waits.set_result((kind, content))
        except (*_LOST, ValueError):
            pass
        finally:
            self.is_lost = True
            self._writer.close()
            for waits in self._waiting.values():
                if not waits.done():
                    waits.set_exception(ConnectionResetError("the connection was lost"))


_ANSWER, _ERROR = "answer", "error"
_REFUSAL = TypeAdapter(tuple[str, str, str | None, str | None, float | None])


def _proof(secret: str, side: str, callers_nonce: str, servers_nonce: str) -> str:
    return hmac.new(
        secret.encode(), f"{side} {callers_nonce} {servers_nonce}".encode(), hashlib.sha256
    ).hexdigest()


def _refusal(error: AzuError) -> list[Any]:
    return [type(error).__name__, error.message, error.param, error.code, error.retry_after_s]


def _error(refusal: bytes) -> AzuError:
    name, message, param, code, retry_after_s = _REFUSAL.validate_json(refusal)
    known = next((one for one in error_classes() if one.__name__ == name), InternalError)
    return known(message, param=param, code=code, retry_after_s=retry_after_s)


def _answer_frame(number: str, answer: Any) -> bytes:
    """Return the frame of an answer, or of an error: also of the one that an answer does not cross."""
    try:
        if not isinstance(answer, AzuError):
            return _frame(number, _ANSWER, to_json(answer))
    except Exception as error:
        answer = as_known_error(error, "an answer")
    return _frame(number, _ERROR, to_json(_refusal(answer)))


def _frame(first: str, second: str, content: bytes = b"", most_bytes: int = _MAX_FRAME_BYTES) -> bytes:
    text = f"{first} {second}\n".encode() + content
    if len(text) > most_bytes:
        raise InternalError(f"a call or an answer of {len(text)} bytes does not cross")
    return _LENGTH.pack(len(text)) + text


class _InFlight:
    """The calls of one connection that are read or run."""

    def __init__(self) -> None:
        self._num_calls = self._num_bytes = 0
        self._has_ended = asyncio.Event()

    async def begin(self, num_bytes: int) -> None:
        """Wait until a call of so many bytes may be read."""
        while self._num_calls >= _MAX_IN_FLIGHT or self._num_bytes + num_bytes > _MAX_IN_FLIGHT_BYTES:
            self._has_ended.clear()
            await self._has_ended.wait()
        self._num_calls += 1
        self._num_bytes += num_bytes

    def end(self, num_bytes: int, _: object) -> None:
        """Note that such a call has ended."""
        self._num_calls -= 1
        self._num_bytes -= num_bytes
        self._has_ended.set()


async def _read(reader: asyncio.StreamReader, most_bytes: int) -> tuple[str, str, bytes]:
    """Return a frame's two words and its content; raises ValueError for a frame that is none."""
    return await _read_text(reader, await _read_size(reader, most_bytes))


async def _read_size(reader: asyncio.StreamReader, most_bytes: int) -> int:
    size: int
    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if size > most_bytes:
        raise ValueError(f"a frame of {size} bytes")
    return size


async def _read_text(reader: asyncio.StreamReader, size: int) -> tuple[str, str, bytes]:
    line, _, content = (await reader.readexactly(size)).partition(b"\n")
    first, second = line.decode("ascii").split(" ")
    return first, second, content
