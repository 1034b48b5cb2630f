"""The treasury as a real process over a real devnet and a real Redis: started, stopped and killed."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from azu.cli.treasury import run_treasury
from azu.errors import ConfigurationError
from azu.money.ledger.transfers import CHAIN
from azu.money.treasury.request_reply import CreditState
from tests.money.treasury.booked import (
    PAID,
    all_paid,
    assert_paid_once,
    earn,
    fund_platform,
    owners_who_claimed,
)
from tests.money.treasury.dying import Treasury
from tests.money.treasury.world import SEED, Open, World

TREASURY = [sys.executable, "-c", "from azu.cli.treasury import run_treasury; run_treasury()"]


def environment(world: World, books_url: str) -> dict[str, str]:
    server = urlsplit(world.redis_url)
    return os.environ | {
        "HYPERLIQUID_RPC_URL": world.devnet.url,
        "HYPERLIQUID_ADDRESS": world.platform.address,
        "REDIS_HOST": str(server.hostname),
        "REDIS_PORT": str(server.port),
        "AZU_BOOKS_URL": books_url,
        "SCHEDULER_PRIVATE_KEY": world.platform.key.hex(),
    }


@contextmanager
def running(world: World, parts: Open) -> Iterator[subprocess.Popen[str]]:
    variables = environment(world, parts.books.access.url("treasury"))
    process = subprocess.Popen(
        TREASURY, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "treasury ready\n"


def test_it_credits_deposits_answers_requests_and_stops_at_a_signal(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        await parts.pay_platform(alice, 5)
        with running(world, parts) as process:
            await asyncio.to_thread(wait_until_ready, process)
            assert await parts.available(alice) == 5
            tx_hash = await parts.pay_platform(alice, 60)
            verdict = await parts.deposits.ask(tx_hash, alice.address, 10.0)
            assert (verdict.state, verdict.lamports) == (CreditState.CREDITED, 60)
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


def test_it_waits_for_a_chain_that_is_away(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        await parts.pay_platform(alice, 5)
        world.devnet.fault("restart", seconds=3.0)
        with running(world, parts) as process:
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
        ("AZU_BOOKS_URL", ""),
    ],
)
def test_it_does_not_start_without_the_platforms_key_its_chain_and_its_books(
    world: World, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    for name, good in environment(world, "wire://treasury:secret@127.0.0.1:9").items():
        monkeypatch.setenv(name, good)
    monkeypatch.setenv(variable, value)

    with pytest.raises(ConfigurationError) as caught:
        run_treasury()

    assert world.platform.key.hex() not in str(caught.value)
    assert "SCHEDULER_PRIVATE_KEY" not in os.environ


@pytest.mark.prove
@pytest.mark.parametrize("run", range(3))
def test_it_is_killed_at_random_under_faults_and_pays_every_worker_once(world: World, run: int) -> None:
    dice = random.Random(SEED + run)
    fund_platform(world)

    async def scenario(parts: Open) -> None:
        # The devnet still shows the payments of earlier runs.
        first = 1000 + 20 * run
        owners = await owners_who_claimed(world, parts, range(first, first + 20))
        await earn(parts, owners)
        for kind in ("reply_dropped_before", "reply_dropped_after", "server_error_after", "rate_limited"):
            world.devnet.fault(kind, times=None, chance=0.1)
            world.devnet.fault(kind, times=None, chance=0.05, path="/info")
        world.devnet.fault("rows_late", times=None, chance=0.3, seconds=1.0)
        world.devnet.fault("rows_twice", times=None, chance=0.3)
        books_url = parts.books.access.url("treasury")
        treasury = Treasury(world.redis_url, books_url, world.devnet.url, world.platform.key.hex(), PAID)
        for _ in range(12):
            process = treasury.start()
            await asyncio.sleep(dice.uniform(0.2, 1.5))
            process.kill()
        process = treasury.start()
        assert await all_paid(parts, owners, 120.0)
        process.kill()
        world.devnet.no_faults()
        # Rows that are still late would show a second payment.
        await asyncio.sleep(1.2)

        await assert_paid_once(world, parts, owners)
        assert (await parts.balances())[CHAIN] == -sum(PAID + index for index in range(20))

    world.run(scenario)
