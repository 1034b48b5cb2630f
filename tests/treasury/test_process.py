"""The treasury as a real process over a real devnet and a real Redis: started, stopped and killed."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from eth_account.signers.local import LocalAccount

from azu.cli.treasury import treasury
from azu.errors import ConfigurationError
from azu.ledger.accounts import CHAIN
from azu.treasury.claims import ClaimStatus
from azu.treasury.process import _every
from tests.treasury.booked import PAID, all_paid, assert_paid_once, earn, fund_platform, owners_who_claimed
from tests.treasury.world import SEED, Open, World

TREASURY = [sys.executable, "-c", "from azu.cli.treasury import treasury; treasury()"]


def environment(world: World) -> dict[str, str]:
    server = urlsplit(world.redis_url)
    return os.environ | {
        "HYPERLIQUID_RPC_URL": world.devnet.url,
        "HYPERLIQUID_ADDRESS": world.platform.address,
        "REDIS_HOST": str(server.hostname),
        "REDIS_PORT": str(server.port),
        "SCHEDULER_PRIVATE_KEY": world.platform.key.hex(),
    }


@contextmanager
def running(world: World, command: list[str] = TREASURY) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, env=environment(world), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def dying(world: World, at: int = 0, when: str = "before") -> list[str]:
    arguments = [world.redis_url, world.devnet.url, str(PAID), str(at), when]
    return [sys.executable, "-m", "tests.treasury.dying", *arguments]


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "treasury ready\n"


def test_it_credits_deposits_answers_claims_and_stops_when_told(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        await parts.pay_platform(alice, 5)
        with running(world) as process:
            await asyncio.to_thread(wait_until_ready, process)
            assert await parts.available(alice) == 5
            tx_hash = await parts.pay_platform(alice, 60)
            verdict = await parts.claims.ask(tx_hash, alice.address, 10.0)
            assert (verdict.status, verdict.lamports) == (ClaimStatus.CREDITED, 60)
            shown = Path(f"/proc/{process.pid}/environ").read_text()
            assert "SCHEDULER_PRIVATE_KEY" in shown
            assert world.platform.key.hex() not in shown

            process.send_signal(signal.SIGTERM)
            out, log = await asyncio.to_thread(process.communicate, timeout=10)

        assert process.returncode == 0
        assert out == ""
        assert f"credited 60 lamports to {alice.address.lower()}" in log
        assert world.platform.key.hex() not in log
        assert await parts.available(alice) == 65

    world.run(scenario)


def test_a_duty_ends_though_a_library_swallowed_its_cancellation() -> None:
    async def scenario() -> None:
        reached = asyncio.Event()

        async def deaf() -> None:
            reached.set()
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

        duty = asyncio.create_task(_every(0.001, deaf))
        await reached.wait()
        duty.cancel()
        await asyncio.wait_for(duty, 5)

    asyncio.run(scenario())


def test_it_waits_for_a_chain_that_is_away(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        await parts.pay_platform(alice, 5)
        world.devnet.fault("restart", seconds=3.0)
        with running(world) as process:
            await asyncio.to_thread(wait_until_ready, process)

        assert await parts.available(alice) == 5

    world.run(scenario)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SCHEDULER_PRIVATE_KEY", "0x12"),
        ("HYPERLIQUID_ADDRESS", "0x" + "12" * 20),
        ("HYPERLIQUID_RPC_URL", ""),
        ("REDIS_HOST", ""),
    ],
)
def test_it_does_not_start_without_the_platforms_key_its_chain_and_its_books(
    world: World, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    for name, good in environment(world).items():
        monkeypatch.setenv(name, good)
    monkeypatch.setenv(variable, value)

    with pytest.raises(ConfigurationError) as caught:
        treasury()

    assert world.platform.key.hex() not in str(caught.value)
    assert "SCHEDULER_PRIVATE_KEY" not in os.environ


def forget_everything(world: World) -> None:
    with redis.Redis.from_url(world.redis_url) as client:
        client.flushall()


async def all_booked(parts: Open, addresses: list[str], user: LocalAccount, lamports: int) -> bool:
    paid = await all_paid(parts, addresses, 60.0)
    deadline = time.monotonic() + 30.0
    while await parts.available(user) < lamports and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return paid and await parts.available(user) == lamports


@pytest.mark.prove
@pytest.mark.parametrize("when", ["before", "after"])
def test_it_is_killed_at_every_write_and_send_and_pays_and_credits_once(world: World, when: str) -> None:
    alice = world.payer()
    fund_platform(world)

    async def scenario(parts: Open) -> None:
        deaths = 0
        for at in range(1, 100):
            forget_everything(world)
            owners = await owners_who_claimed(world, parts, [at])
            await earn(parts, owners)
            deposit = await parts.pay_platform(alice, at)
            claim = asyncio.create_task(parts.claims.ask(deposit, alice.address, 60.0))
            # Everything alice ever sent: the cursor was forgotten with the ledger.
            done = asyncio.create_task(all_booked(parts, owners, alice, sum(range(1, at + 1))))
            with running(world, dying(world, at, when)) as first:
                while first.poll() is None and not done.done():
                    await asyncio.sleep(0.02)
                died = first.poll() == -signal.SIGKILL
            deaths += died
            with running(world, dying(world)):
                assert await done, f"killed {when} effect {at}"
                assert (await claim).lamports == at

            await assert_paid_once(world, parts, owners)
            if not died:
                break
        assert deaths >= 15

    world.run(scenario)


@pytest.mark.prove
@pytest.mark.parametrize("run", range(3))
def test_it_is_killed_at_random_under_faults_and_pays_everybody_once(world: World, run: int) -> None:
    dice = random.Random(SEED + run)
    fund_platform(world)

    async def scenario(parts: Open) -> None:
        owners = await owners_who_claimed(world, parts, range(1000, 1020))
        await earn(parts, owners)
        for kind in ("reply_dropped_before", "reply_dropped_after", "server_error_after", "rate_limited"):
            world.devnet.fault(kind, times=None, chance=0.1)
            world.devnet.fault(kind, times=None, chance=0.05, path="/info")
        world.devnet.fault("rows_late", times=None, chance=0.3, seconds=1.0)
        world.devnet.fault("rows_twice", times=None, chance=0.3)
        for _ in range(12):
            with running(world, dying(world)) as process:
                await asyncio.to_thread(wait_until_ready, process)
                await asyncio.sleep(dice.uniform(0.0, 1.0))
                process.send_signal(signal.SIGKILL)
        with running(world, dying(world)):
            assert await all_paid(parts, owners, 120.0)

        await assert_paid_once(world, parts, owners)
        assert (await parts.ledger.balances())[CHAIN] == -sum(PAID + index for index in range(20))

    world.run(scenario)
