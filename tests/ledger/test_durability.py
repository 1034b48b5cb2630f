"""What was acknowledged survives the death of the server, at any moment and under load."""

import asyncio
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from azu.connection import connect_redis
from azu.errors import InsufficientBalance, LedgerError, Unavailable
from azu.ledger.audit import audit
from azu.ledger.durable import DURABLE_CONFIG
from azu.ledger.redis import RedisLedger
from azu.ledger.transfers import Transfer
from tests.builders import ALICE, BOB
from tests.ledger import moves
from tests.redis_server import RunningRedis, start_redis

CLIENTS = 8
KILLS = 20


class Client:
    """Sends jobs one after the other, each transfer again until it is acknowledged or its round ends."""

    def __init__(self, name: int, seed: int) -> None:
        self.name = name
        self.random = random.Random(f"{seed}-{name}")
        self.jobs = 0
        self.unsure: list[Transfer] = []
        self.acknowledged: list[Transfer] = []

    def next_transfers(self) -> list[Transfer]:
        self.jobs += 1
        job = f"{self.name}-{self.jobs}"
        address, reserved = self.random.choice([ALICE, BOB]), self.random.randrange(1, 50)
        charged = self.random.randrange(reserved + 1)
        ends: list[Transfer] = [moves.settle(job, charged, w0=charged // 2), moves.release(job)]
        return [
            moves.deposit(60, address=address, tx_hash=f"0x{job}"),
            moves.reserve(job, reserved, address=address),
            self.random.choice(ends),
        ]

    async def work(self, ledger: RedisLedger) -> None:
        """Work until Redis dies."""
        try:
            while True:
                self.unsure = self.unsure or self.next_transfers()
                while self.unsure:
                    await ledger.apply(self.unsure[0])
                    self.acknowledged.append(self.unsure.pop(0))
        except Unavailable:
            return


async def round_of_work(server: RunningRedis, clients: list[Client], seconds: float) -> None:
    ledgers = [RedisLedger.from_url(server.url) for _ in clients]
    work = [asyncio.create_task(one.work(ledger)) for one, ledger in zip(clients, ledgers, strict=True)]
    await asyncio.sleep(seconds)
    server.kill()
    await asyncio.gather(*work)
    for ledger in ledgers:
        await ledger.close()


async def check(server: RunningRedis, clients: list[Client]) -> None:
    ledger = RedisLedger.from_url(server.url)
    report = await audit(await ledger.snapshot(), ledger.journal())
    assert report.agrees, report.findings
    kept = {entry.transfer.id: entry.transfer async for entry in ledger.journal()}
    for one in clients:
        for transfer in one.acknowledged:
            assert kept.pop(transfer.id) == transfer
    # The rest are those whose answer was lost.
    assert kept.keys() <= {one.unsure[0].id for one in clients if one.unsure}
    await ledger.close()


@pytest.mark.prove
def test_a_killed_server_loses_no_acknowledged_transfer(tmp_path: Path, figures: Counter[str]) -> None:
    seed = int(os.environ.get("AZU_TEST_SEED", "1"))
    pause = random.Random(seed)
    clients = [Client(name, seed) for name in range(CLIENTS)]
    server = start_redis(tmp_path, DURABLE_CONFIG)
    for _ in range(KILLS):
        asyncio.run(round_of_work(server, clients, pause.uniform(0.05, 0.6)))
        server = start_redis(tmp_path, DURABLE_CONFIG, port=server.port)
        asyncio.run(check(server, clients))
    server.stop()
    acknowledged = sum(len(one.acknowledged) for one in clients)
    assert acknowledged > 10 * KILLS
    figures["times Redis was killed under load"] += KILLS
    figures["transfers acknowledged meanwhile, of which none was lost"] += acknowledged


def test_a_transfer_is_on_disk_before_it_is_acknowledged(tmp_path: Path) -> None:
    async def scenario(server: RunningRedis) -> None:
        ledger = RedisLedger.from_url(server.url)
        await ledger.apply(moves.deposit(5))
        written = (tmp_path / DURABLE_CONFIG["appendfilename"]).read_bytes()
        assert b"deposit:0x01" in written
        with pytest.raises(InsufficientBalance):
            await ledger.apply(moves.reserve("job-1", 6))
        assert b"reserve:job-1" not in (tmp_path / DURABLE_CONFIG["appendfilename"]).read_bytes()
        await ledger.close()

    server = start_redis(tmp_path, DURABLE_CONFIG)
    asyncio.run(scenario(server))
    server.stop()


def test_a_ledger_goes_on_when_its_server_has_started_again(tmp_path: Path) -> None:
    async def scenario(first: RunningRedis) -> RunningRedis:
        ledger = RedisLedger.from_url(first.url)
        await ledger.apply(moves.deposit(5))
        first.kill()
        with pytest.raises(Unavailable):
            await ledger.apply(moves.reserve("job-1", 5))
        second = start_redis(tmp_path, DURABLE_CONFIG, port=first.port)
        assert (await ledger.apply(moves.deposit(5))).repeated
        assert not (await ledger.apply(moves.reserve("job-1", 5))).repeated
        await ledger.close()
        return second

    asyncio.run(scenario(start_redis(tmp_path, DURABLE_CONFIG))).stop()


def test_a_redis_without_memory_refuses_a_transfer_wholly(tmp_path: Path) -> None:
    async def scenario(server: RunningRedis) -> None:
        ledger, redis = RedisLedger.from_url(server.url), connect_redis(server.url)
        await ledger.apply(moves.deposit(5))
        await redis.config_set("maxmemory", "1")
        with pytest.raises(LedgerError, match="maxmemory"):
            await ledger.apply(moves.reserve("job-1", 1))
        await redis.config_set("maxmemory", "0")
        assert (await audit(await ledger.snapshot(), ledger.journal())).agrees
        assert not (await ledger.apply(moves.reserve("job-1", 1))).repeated
        await redis.aclose()
        await ledger.close()

    server = start_redis(tmp_path, DURABLE_CONFIG)
    asyncio.run(scenario(server))
    server.stop()
