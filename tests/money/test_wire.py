"""Calls between processes: who may make which, what crosses, and what is seen of a server that is away."""

import asyncio
import hashlib
import hmac
import json
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from azu.contact import Contact
from azu.errors import (
    ConfigurationError,
    Forbidden,
    InsufficientBalance,
    InternalError,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from azu.money import wire
from azu.money.wire import Access, Remote, WireServer


@dataclass(frozen=True)
class Work:
    """A value with a key that JSON does not have."""

    by_layer: Mapping[int, Mapping[str, int]]
    note: str | None = None


class Sums:
    """The calls of a small server."""

    async def add(self, left: int, right: int = 1) -> int:
        """Return the sum."""

    async def same(self, work: Work, words: tuple[str, ...]) -> tuple[Work, tuple[str, ...]]:
        """Return what was sent."""

    async def refuse(self) -> None:
        """Raise an error with all that errors have."""

    async def fail(self) -> None:
        """Make a mistake."""

    async def wait(self, seconds: float) -> float:
        """Answer late."""

    async def long(self, characters: int) -> str:
        """Return a long text."""

    async def keep(self, text: str) -> int:
        """Answer once the test lets it."""


@dataclass
class Served(Sums):
    added: list[int] = field(default_factory=list)
    kept: int = 0
    may_end: asyncio.Event = field(default_factory=asyncio.Event)

    async def add(self, left: int, right: int = 1) -> int:
        self.added.append(left)
        return left + right

    async def same(self, work: Work, words: tuple[str, ...]) -> tuple[Work, tuple[str, ...]]:
        return work, words

    async def refuse(self) -> None:
        raise InsufficientBalance(
            "too little", param="lamports", code="spend_limit_reached", retry_after_s=3.0
        )

    async def fail(self) -> None:
        raise KeyError("secret")

    async def wait(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    async def long(self, characters: int) -> str:
        return "x" * characters

    async def keep(self, text: str) -> int:
        self.kept += 1
        await self.may_end.wait()
        return len(text)


class Client(Remote, Sums, calls=Sums):
    """The client of these calls."""


ALLOWED = {
    "all": frozenset({"add", "same", "refuse", "fail", "wait", "long", "keep"}),
    "few": frozenset({"add"}),
}


@dataclass
class World:
    """A server that a test can stop and start again at its port."""

    access: Access
    served: Served = field(default_factory=Served)
    server: WireServer | None = None

    async def start(self) -> None:
        self.server = WireServer(Sums, self.served, self.access.secrets, ALLOWED)
        self.access = Access(await self.server.start(self.access.port), self.access.secrets)

    async def stop(self) -> None:
        assert self.server is not None
        await self.server.close()

    def client(self, caller: str = "all", silence_s: float = 0.5) -> Client:
        return Client(self.access.url(caller), Contact("the sums", "are"), silence_s=silence_s)


@asynccontextmanager
async def running() -> AsyncIterator[World]:
    world = World(Access.new(0, ALLOWED))
    await world.start()
    try:
        yield world
    finally:
        await world.stop()


def play(scenario: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        async with running() as world:
            await asyncio.wait_for(scenario(world), 20)

    asyncio.run(run())


def test_arguments_and_answers_cross_as_their_annotations_say() -> None:
    async def scenario(world: World) -> None:
        client = world.client()
        assert await client.add(1) == 2
        assert await client.add(1, right=5) == 6
        sent = Work({3: {"a": 2**62}}, "ü"), ("one", "two")
        assert await client.same(*sent) == sent

    play(scenario)


def test_many_calls_share_a_connection_and_are_answered_in_any_order() -> None:
    async def scenario(world: World) -> None:
        client = world.client(silence_s=15.0)
        late = asyncio.create_task(client.keep("late"))
        assert await asyncio.gather(*map(client.add, range(1000))) == list(range(1, 1001))
        assert not late.done()
        world.served.may_end.set()
        assert await late == 4

    play(scenario)


def test_an_error_crosses_with_its_class_param_code_and_time() -> None:
    async def scenario(world: World) -> None:
        client = world.client()
        with pytest.raises(InsufficientBalance, match="too little") as refused:
            await client.refuse()
        error = refused.value
        assert (error.param, error.code, error.retry_after_s) == ("lamports", "spend_limit_reached", 3.0)
        with pytest.raises(InternalError) as failed:
            await client.fail()
        assert "secret" not in failed.value.message
        assert client.problem() is None

    play(scenario)


def test_a_caller_makes_only_its_own_calls() -> None:
    async def scenario(world: World) -> None:
        few = world.client("few")
        assert await few.add(1) == 2
        with pytest.raises(Forbidden):
            await few.refuse()

    play(scenario)


@pytest.mark.parametrize("arguments", [{"left": "x"}, {}, {"left": 1, "more": 1}, [1], None])
def test_arguments_that_do_not_fit_are_refused(arguments: object) -> None:
    async def scenario(world: World) -> None:
        client = world.client()
        await client.add(1)
        connection = await client._connection()
        kind, refusal = await connection.ask("add", json.dumps(arguments).encode())
        assert (kind, json.loads(refusal)[0]) == ("error", InvalidRequest.__name__)
        assert await client.add(1) == 2

    play(scenario)


def test_a_frame_that_is_too_large_does_not_cross() -> None:
    async def scenario(world: World) -> None:
        client = world.client()
        with pytest.raises(InternalError, match="does not cross"):
            await client.long(2**24)
        assert len(await client.long(2**20)) == 2**20
        with pytest.raises(InternalError, match="does not cross"):
            await client.keep("x" * 2**21)

    play(scenario)


@pytest.mark.parametrize(("calls", "size", "most"), [(12, 2_000, 8), (12, 10, 10)])
def test_a_connection_holds_so_many_calls_and_bytes_and_the_others_wait(
    calls: int, size: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_MAX_IN_FLIGHT", 10)
    monkeypatch.setattr(wire, "_MAX_IN_FLIGHT_BYTES", 17_000)

    async def scenario(world: World) -> None:
        # Less than they are asked to wait, so that nothing is asked a second time.
        client = world.client(silence_s=15.0)
        asked = [asyncio.create_task(client.keep("x" * size)) for _ in range(calls)]
        while world.served.kept < most:
            await asyncio.sleep(0.01)
        # Another connection is not held up, and long enough for one more call to come through.
        other = world.client("few")
        for _ in range(20):
            assert await other.add(1) == 2
        assert world.served.kept == most
        world.served.may_end.set()
        assert await asyncio.gather(*asked) == [size] * calls

    play(scenario)


def test_a_caller_with_another_secret_is_refused_and_the_server_says_nothing() -> None:
    async def scenario(world: World) -> None:
        for caller in ("all", "unknown"):
            wrong = Access(world.access.port, {caller: "another"})
            client = Client(wrong.url(caller), Contact("the sums", "are"), silence_s=0.2)
            with pytest.raises(Unavailable):
                await client.add(1)
        # One that skips the proof, and one that sends too much before it.
        for sent in (frame("all nonce") + frame("1 add", {"left": 1}), struct.pack(">I", 2**20)):
            reader, writer = await asyncio.open_connection("127.0.0.1", world.access.port)
            writer.write(sent)
            heard = await reader.read()
            assert len(heard) < 300
            writer.close()
        assert world.served.added == []

    play(scenario)


@pytest.mark.prove
def test_connections_of_one_caller_or_of_strangers_keep_no_other_caller_out() -> None:
    async def scenario(world: World) -> None:
        silent = [await asyncio.open_connection("127.0.0.1", world.access.port) for _ in range(70)]
        many = [world.client("few") for _ in range(70)]
        answers = [await asyncio.gather(client.add(1), return_exceptions=True) for client in many]

        assert await world.client().add(5) == 6

        assert sum(isinstance(one, Unavailable) for [one] in answers) == 6
        assert await silent[0][0].read() == b""
        for _, writer in silent:
            writer.close()
        for client in many:
            await client.close()

    play(scenario)


def frame(words: str, content: object = None) -> bytes:
    text = f"{words}\n{json.dumps(content)}".encode()
    return struct.pack(">I", len(text)) + text


def test_a_process_in_the_servers_place_learns_no_secret_and_gets_no_call() -> None:
    async def scenario(world: World) -> None:
        heard = bytearray()

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            (size,) = struct.unpack(">I", await reader.readexactly(4))
            greeting = await reader.readexactly(size)
            _, nonce = greeting.decode().split()
            heard.extend(greeting)
            guessed = hmac.new(b"guess", f"server {nonce} n".encode(), hashlib.sha256).hexdigest()
            writer.write(frame(f"n {guessed}"))
            heard.extend(await reader.read())

        await world.stop()
        async with await asyncio.start_server(listen, "127.0.0.1", world.access.port):
            with pytest.raises(Unavailable, match="another process"):
                await world.client().add(1)
        assert world.access.secrets["all"].encode() not in heard
        assert b"add" not in heard

    play(scenario)


def test_a_server_that_is_away_is_said_to_be_away_within_the_silence_and_found_again() -> None:
    async def scenario(world: World) -> None:
        client = world.client()
        await client.add(1)
        await world.stop()
        began_s = time.monotonic()
        with pytest.raises(Unavailable, match="the sums did not answer") as away:
            await client.add(1)
        assert time.monotonic() - began_s < 1.0
        assert away.value.retry_after_s
        assert "the sums are away" in str(client.problem())
        await world.start()
        assert await client.add(1) == 2
        assert client.problem() is None

    play(scenario)


def test_a_call_waits_for_a_server_that_starts_again_meanwhile() -> None:
    async def scenario(world: World) -> None:
        client = world.client(silence_s=5.0)
        await client.add(1)
        await world.stop()
        waits = asyncio.create_task(client.add(7))
        await asyncio.sleep(0.2)
        await world.start()
        assert await waits == 8

    play(scenario)


@pytest.mark.prove
def test_a_silent_server_fails_a_call_but_not_one_that_waits_while_others_are_answered() -> None:
    async def scenario(world: World) -> None:
        client = world.client(silence_s=0.3)
        with pytest.raises(Unavailable, match="no answer came in time"):
            await client.wait(5.0)
        late = asyncio.create_task(client.wait(1.0))
        while not late.done():
            await client.add(1)
            await asyncio.sleep(0.05)
        assert await late == 1.0

    play(scenario)


def test_the_access_is_kept_in_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    access = Access.new(7, ["all"])
    assert access.secrets["all"] not in repr(access)
    access.write(tmp_path / "access.json")
    assert (tmp_path / "access.json").stat().st_mode & 0o777 == 0o600
    assert Access.read(tmp_path / "access.json") == access
    with pytest.raises(NotFound):
        Access.read(tmp_path / "none.json")
    (tmp_path / "access.json").write_text("{}")
    with pytest.raises(ConfigurationError):
        Access.read(tmp_path / "access.json")
    with pytest.raises(ConfigurationError):
        Client("http://127.0.0.1:1", Contact("the sums"), silence_s=1.0)
