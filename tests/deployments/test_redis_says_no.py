"""Redis refuses, freezes or dies under eight streams: each goes on, new requests are told, money agrees."""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import redis

from azu.jobs.redis import RedisJobs
from azu.protocol.job import JobState
from tests.deployments.local import LocalIngress, local_ingress, unhurried
from tests.redis_server import Rewindable, start_redis

DURABLE = {"appendonly": "yes", "appendfsync": "always", "save": ""}
CLIENTS = 8
TOKENS = tuple(range(70, 90))
COMPLETION = {"model": "azu/tiny-dense", "prompt": "Hello", "max_tokens": 60, "stream": True}


class Breakable:
    """A Redis and what can happen to it; each method is a fault that lasts as long as its block."""

    def __init__(self, folder: Path) -> None:
        self.server = start_redis(folder, DURABLE)
        self.admin = redis.Redis(port=self.server.port)

    @contextmanager
    def is_a_replica(self) -> Iterator[None]:
        self.admin.replicaof("127.0.0.1", 1)
        yield
        self.admin.replicaof("NO", "ONE")

    @contextmanager
    def lacks_replicas(self) -> Iterator[None]:
        self.admin.config_set("min-replicas-to-write", 1)
        yield
        self.admin.config_set("min-replicas-to-write", 0)

    @contextmanager
    def is_out_of_memory(self) -> Iterator[None]:
        self.admin.config_set("maxmemory", 1)
        yield
        self.admin.config_set("maxmemory", 0)

    @contextmanager
    def cannot_save(self) -> Iterator[None]:
        (self.server.folder / "dump.rdb" / "in-the-way").mkdir(parents=True)
        self.admin.config_set("save", "3600 1")
        self.admin.bgsave()
        while self.admin.info("persistence")["rdb_last_bgsave_status"] == "ok":
            time.sleep(0.01)
        yield
        self.admin.config_set("save", "")

    @contextmanager
    def has_another_password(self) -> Iterator[None]:
        self.admin.config_set("requirepass", "another")
        self.admin.client_kill_filter(_type="normal", skipme=True)
        yield
        self.admin.config_set("requirepass", "")

    @contextmanager
    def is_frozen(self) -> Iterator[None]:
        self.server.process.send_signal(signal.SIGSTOP)
        yield
        self.server.process.send_signal(signal.SIGCONT)

    @contextmanager
    def is_dead(self) -> Iterator[None]:
        self.server.kill()
        yield
        self.server = start_redis(self.server.folder, DURABLE, port=self.server.port)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Breakable]:
    breakable = Breakable(tmp_path / "redis")
    yield breakable
    breakable.server.kill()


async def until_all_run(jobs: RedisJobs, address: str, known: int) -> None:
    while sum(record.delivered > 0 for record in await jobs.of(address, 1000)) < known + CLIENTS:
        await asyncio.sleep(0.01)


async def stream(client: httpx.AsyncClient) -> str:
    reply = await client.post("/v1/completions", json=COMPLETION)
    assert reply.status_code == 200, reply.text
    return reply.text


def text_of(answer: str) -> str:
    """Return a stream without what differs between two jobs."""
    return "".join(line.partition('"text":')[2] for line in answer.splitlines())


@pytest.mark.prove
def test_every_stream_goes_on_and_new_requests_are_told_to_come_again(
    store: Breakable, tmp_path: Path
) -> None:
    faults: list[Callable[[], object]] = [
        store.is_a_replica, store.lacks_replicas, store.is_out_of_memory, store.cannot_save,
        store.has_another_password, store.is_frozen, store.is_dead,
    ]  # fmt: skip

    async def play(ingress: LocalIngress) -> None:
        ingress.model.token_ids, ingress.model.pause_s = TOKENS, 0.02
        address, key = await ingress.user()
        jobs, books = RedisJobs.from_url(store.server.url), ingress.books.bookkeeper
        async with ingress.client(key) as client:
            right = text_of(await stream(client))
            assert right
            for number, fault in enumerate(faults):
                streams = [asyncio.create_task(stream(client)) for _ in range(CLIENTS)]
                await until_all_run(jobs, address, 1 + number * CLIENTS)
                began_s = time.monotonic()
                with fault():  # type: ignore[attr-defined]
                    refused = await client.post("/v1/completions", json=COMPLETION)
                    told_s = time.monotonic() - began_s
                    health = await client.get("/health")
                assert refused.status_code == 503, (fault, refused.text)
                assert int(refused.headers["retry-after"]) >= 1
                if fault in (store.has_another_password, store.is_frozen, store.is_dead):
                    # A Redis that refuses only writes still answers.
                    assert health.status_code == 503
                    assert "Redis is away" in health.text
                print(fault.__name__, f"{time.monotonic() - began_s:.2f} s", f"{told_s:.2f} s")
                assert {text_of(answer) for answer in await asyncio.gather(*streams)} == {right}, fault
            assert (await client.get("/health")).status_code == 200

            records = await jobs.of(address, 1000)
            assert {record.state for record in records} == {JobState.DONE}
            assert len(records) == 1 + len(faults) * CLIENTS
            assert (await books.balance(address)).reserved_lamports == 0
            assert (await books.audit()).findings == ()

    async def run() -> None:
        async with local_ingress(store.server.url, tmp_path / "home", unhurried()) as ingress:
            await asyncio.wait_for(play(ingress), 120)

    asyncio.run(run())


@pytest.mark.prove
def test_readers_of_jobs_that_redis_lost_are_told_and_nothing_is_left_of_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("azu.jobs.token_reader._QUIET_S", 0.2)
    store = Rewindable.start(tmp_path / "redis")

    async def play(ingress: LocalIngress) -> None:
        ingress.model.token_ids, ingress.model.pause_s = TOKENS, 0.05
        address, key = await ingress.user()
        jobs, books = RedisJobs.from_url(store.server.url), ingress.books.bookkeeper
        async with ingress.client(key) as client:
            await client.get("/v1/models/azu/tiny-dense")
            position = store.position()
            streams = [asyncio.create_task(stream(client)) for _ in range(CLIENTS)]
            await until_all_run(jobs, address, 0)
            await asyncio.to_thread(store.rewind, position)

            for answer in await asyncio.gather(*streams):
                assert '"code":"job_lost"' in answer
            assert await jobs.of(address, 100) == []
            assert (await books.balance(address)).reserved_lamports == 0
            # What was lost was no money of others.
            ingress.model.pause_s = 0.0
            assert "[DONE]" in await stream(client)
            assert (await books.audit()).findings == ()

    async def run() -> None:
        async with local_ingress(store.server.url, tmp_path / "home", unhurried()) as ingress:
            await asyncio.wait_for(play(ingress), 120)

    try:
        asyncio.run(run())
    finally:
        store.server.kill()
