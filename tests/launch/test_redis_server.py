"""azu's own Redis keeps what it acknowledged, and refuses clients without a password."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
import redis
from redis.asyncio import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from azu.auth.challenges import RedisChallenges
from azu.auth.signatures import Withdrawal
from azu.errors import DeadlineExceeded, Forbidden, Unavailable
from azu.jobs.redis import RedisJobs
from azu.launch.processes import ProcessGroup
from azu.launch.redis_server import (
    BOOKS_STORE,
    JOB_STORE,
    RedisServer,
    RedisUrls,
    Store,
    start_redis,
    start_stores,
    wait_for_redis,
)
from azu.metrics import Meter
from azu.models.status import RedisModelStatus
from azu.money.bookkeeping import Bookkeeper
from azu.money.books import Books
from azu.money.ledger.durability import append_only_files
from azu.money.treasury.redis import RedisCursor, RedisLease, RedisMetrics, RedisOutbox
from azu.money.treasury.request_reply import CreditState, DepositRequests, DepositStatus
from azu.money.treasury.withdrawals import RedisWithdrawals, SignedWithdrawal
from azu.protocol.job import JobState, TokenEvent
from azu.protocol.phase import JobPhase
from azu.redis_client import connect_redis
from tests.builders import ALICE, BOB, job
from tests.jobs.endings import outcome
from tests.money.accounts import fund, signed_key
from tests.money.serving import PLATFORM, TERMS

TIMEOUT_S = 15.0


def started(group: ProcessGroup, folder: Path, store: Store = BOOKS_STORE) -> RedisServer:
    server = start_redis(group, store, folder)
    wait_for_redis(group, server, TIMEOUT_S)
    return server


def test_it_is_durable_and_evicts_nothing(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path / "logs") as group:
        server = started(group, tmp_path / "redis")
        with redis.Redis.from_url(server.owner, decode_responses=True) as client:
            config = client.config_get("*")

    assert config["appendonly"] == "yes"
    assert config["appendfsync"] == "always"
    assert config["aof-load-truncated"] == "no"
    assert config["maxmemory-policy"] == "noeviction"
    assert config["bind"] == "127.0.0.1"


def test_a_client_without_the_password_is_refused(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path / "logs") as group:
        server = started(group, tmp_path / "redis")
        without = redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0))
        with without as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        arguments = Path(f"/proc/{group.pid(BOOKS_STORE.name)}/cmdline").read_text()

    assert (tmp_path / "redis" / "redis.conf").stat().st_mode & 0o777 == 0o600
    for password in (server.password, *server.passwords.values()):
        assert password not in repr(server) + arguments


def test_what_was_written_is_there_after_a_kill_and_a_restart(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path / "logs") as group:
        server = started(group, tmp_path / "redis")
        with redis.Redis.from_url(server.owner, decode_responses=True) as client:
            client.set("kept", "yes")
            os.kill(group.pid(BOOKS_STORE.name), signal.SIGKILL)
            while not group.revive():
                pass
            wait_for_redis(group, server, TIMEOUT_S)
            assert client.get("kept") == "yes"

    with ProcessGroup(tmp_path / "logs") as group:
        server = started(group, tmp_path / "redis")
        with redis.Redis.from_url(server.owner, decode_responses=True) as client:
            assert client.get("kept") == "yes"


def test_a_damaged_file_is_refused_not_cut_short(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path / "logs") as group:
        server = started(group, tmp_path / "redis")
        with redis.Redis.from_url(server.owner) as client:
            client.set("key", "value")
    file = append_only_files(tmp_path / "redis")[-1]
    file.write_bytes(file.read_bytes()[:-3])

    with ProcessGroup(tmp_path / "logs") as group:
        server = start_redis(group, BOOKS_STORE, tmp_path / "redis")
        with pytest.raises(Unavailable, match=r"end of file|truncated|Bad file format"):
            wait_for_redis(group, server, TIMEOUT_S)


def test_the_store_of_jobs_flushes_once_a_second_and_takes_a_file_that_was_cut(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path / "logs") as group:
        server = started(group, tmp_path / "jobs", JOB_STORE)
        with redis.Redis.from_url(server.owner, decode_responses=True) as client:
            assert client.config_get("appendfsync") == {"appendfsync": "everysec"}
            client.set("first", "value")
            client.set("last", "value")
    file = append_only_files(tmp_path / "jobs")[-1]
    file.write_bytes(file.read_bytes()[:-3])

    with ProcessGroup(tmp_path / "logs") as group:
        server = started(group, tmp_path / "jobs", JOB_STORE)
        with redis.Redis.from_url(server.owner, decode_responses=True) as client:
            assert client.mget("first", "last") == ["value", None]


def test_a_folder_may_have_a_space_in_its_name(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path / "logs") as group:
        started(group, tmp_path / "my redis")

    assert append_only_files(tmp_path / "my redis")[-1].exists()


WITHDRAWAL = Withdrawal(address=ALICE, lamports=1, nonce=1, expires_at_ms=1)


# What each process does with Redis through its own adapters.
async def as_ingress(redis: Redis) -> None:
    jobs = RedisJobs(redis)
    await RedisChallenges(redis, BOB).challenge(ALICE, "ab" * 32, "azu.example", 1)
    await jobs.submit(job())
    await jobs.cancel("job-1")
    with pytest.raises(DeadlineExceeded):
        await DepositRequests(redis).ask("0x" + "12" * 32, ALICE, 0.0)
    following = asyncio.create_task(anext(jobs.events("job-1")))
    await asyncio.sleep(0.05)
    following.cancel()


async def as_scheduler(redis: Redis) -> None:
    jobs = RedisJobs(redis)
    [_] = await jobs.take("scheduler", 1, 60_000)
    await jobs.set_state("job-1", JobState.RUNNING)
    await jobs.explain({"job-1": JobPhase("loading", "its model is being started")})
    assert await jobs.count_fault("job-1") == 1
    assert await Books("wire://scheduler:secret@127.0.0.1:9", redis).treasury_metrics() is None
    await jobs.finish("job-1", outcome())
    await jobs.done("job-1")
    assert await anext(jobs.cancellations()) == ("job-1", False)


async def as_books(url: str, folder: Path) -> None:
    books = Bookkeeper(url, folder, PLATFORM, TERMS)
    await fund(books, 1_000)
    await books.open_key(signed_key())
    await books.seal(1)
    await RedisWithdrawals(books._redis).hand_in(SignedWithdrawal(WITHDRAWAL, "0x"))
    with pytest.raises(Forbidden):
        await books.claim_earnings(ALICE, "0x")
    assert not (await books.earnings(ALICE)).claimed
    assert await books.uncredited() == ()
    await books.verify()
    assert (await books.audit()).agrees
    await books.close()


async def as_pipeline(redis: Redis) -> None:
    await RedisJobs(redis).append([("job-1", TokenEvent(0, (1, 2)))])


async def as_treasury(redis: Redis, jobs_redis: Redis) -> None:
    await RedisCursor(redis).advance(5)
    assert await RedisLease(redis, ttl_ms=100).hold()
    assert await RedisOutbox(redis).open() == ()
    assert await RedisOutbox(redis).open() == ()
    assert len(await RedisWithdrawals(redis).waiting()) == 1
    asked = []

    async def check(tx_hash: str) -> DepositStatus:
        asked.append(tx_hash)
        return DepositStatus(CreditState.UNKNOWN)

    await DepositRequests(jobs_redis).serve(check, 10)
    assert asked == ["0x" + "12" * 32]
    await RedisMetrics(jobs_redis).show("treasury-1", Meter().snapshot())


def test_each_process_reaches_what_it_needs(tmp_path: Path) -> None:
    async def scenario(urls: RedisUrls) -> None:
        await as_books(urls.books, tmp_path / "ledger")
        for duty, *reached in (
            (as_ingress, urls.ingress),
            (as_pipeline, urls.pipeline),
            (as_scheduler, urls.scheduler),
            (as_treasury, urls.treasury, urls.treasury_jobs),
        ):
            clients = [connect_redis(url) for url in reached]
            await duty(*clients)
            for client in clients:
                await client.aclose()

    with ProcessGroup(tmp_path / "logs") as group:
        urls = start_stores(group, tmp_path, group, tmp_path, TIMEOUT_S)
        asyncio.run(asyncio.wait_for(scenario(urls), 20))
        RedisModelStatus(urls.scheduler).get("azu/tiny-dense")


MONEY = ("azu:ledger:journal", "azu:books:1", "azu:treasury:outbox", "azu:treasury:nonce")
OTHERS_KEYS = (
    (BOOKS_STORE, "books", ("azu:auth:key:1", "azu:job:1", "azu:treasury:outbox", "azu:treasury:nonce")),
    (BOOKS_STORE, "treasury", ("azu:ledger:journal", "azu:books:1", "azu:auth:key:1", "azu:jobs:queue")),
    (JOB_STORE, "ingress", (*MONEY, "azu:treasury:withdrawals:waiting", "azu:model:x", "other")),
    (JOB_STORE, "scheduler", (*MONEY, "azu:treasury:claims:waiting", "azu:auth:key:1")),
    (JOB_STORE, "pipeline", (*MONEY, "azu:jobs:queue", "azu:auth:key:1")),
    (JOB_STORE, "treasury", (*MONEY, "azu:auth:key:1", "azu:job:1", "azu:jobs:queue", "azu:model:x")),
)


def test_every_user_has_its_limits_tested() -> None:
    users = [(store.name, user) for store in (BOOKS_STORE, JOB_STORE) for user in store.keys_of]
    assert users == [(store.name, user) for store, user, _ in OTHERS_KEYS]


@pytest.mark.parametrize(("store", "user", "others"), OTHERS_KEYS)
def test_no_process_reaches_the_others_keys_or_the_server_itself(
    tmp_path: Path, store: Store, user: str, others: tuple[str, ...]
) -> None:
    with ProcessGroup(tmp_path / "logs") as group:
        server = started(group, tmp_path / "redis", store)
        with redis.Redis.from_url(server.url(user), decode_responses=True) as client:
            for key in others:
                for refused in (client.get, client.delete, lambda key: client.hset(key, "a", 1)):
                    with pytest.raises(redis.exceptions.NoPermissionError):
                        refused(key)
                with pytest.raises(redis.ResponseError):
                    client.eval("return redis.call('HSET', KEYS[1], 'a', 1)", 1, key)
            for command in (
                client.flushall,
                client.config_get,
                client.keys,
                client.scan,
                client.shutdown,
                client.acl_list,
                lambda: client.config_set("appendonly", "no"),
            ):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    command()
