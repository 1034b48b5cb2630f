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


def environment(world: World, books_url: str, signer_url: str) -> dict[str, str]:
    server = urlsplit(world.redis_url)
    return os.environ | {
        "HYPERLIQUID_RPC_URL": world.devnet.url,
        "HYPERLIQUID_ADDRESS": world.platform.address,
        "REDIS_HOST": str(server.hostname),
        "REDIS_PORT": str(server.port),
        "AZU_BOOKS_URL": books_url,
        "AZU_SIGNER_URL": signer_url,
    }


@contextmanager
def running(world: World, parts: Open) -> Iterator[subprocess.Popen[str]]:
    urls = parts.books.access.url("treasury"), parts.signer.access.url("treasury")
    variables = environment(world, *urls)
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
            assert "AZU_SIGNER_URL" in shown
            assert parts.signer.access.secrets["treasury"] not in shown

            process.send_signal(signal.SIGTERM)
            out, log = await asyncio.to_thread(process.communicate, timeout=10)

        assert process.returncode == 0
        assert out == ""
        assert f"credited 60 lamports to {alice.address.lower()}" in log
        assert await parts.available(alice) == 65

    world.run(scenario)


@pytest.mark.prove
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
        ("HYPERLIQUID_ADDRESS", ""),
        ("HYPERLIQUID_RPC_URL", ""),
        ("REDIS_HOST", ""),
        ("AZU_BOOKS_URL", ""),
        ("AZU_SIGNER_URL", ""),
    ],
)
def test_it_does_not_start_without_its_chain_its_books_and_its_signer(
    world: World, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    for name, good in environment(world, *2 * ["wire://treasury:secret@127.0.0.1:9"]).items():
        monkeypatch.setenv(name, good)
    monkeypatch.setenv(variable, value)

    with pytest.raises(ConfigurationError, match="the treasury needs"):
        run_treasury()


@pytest.mark.prove
@pytest.mark.parametrize("run", range(3))
def test_it_is_killed_at_random_under_faults_and_pays_every_worker_once(world: World, run: int) -> None:
    dice = random.Random(SEED + run)
    fund_platform(world)

    async def scenario(parts: Open) -> None:
        # The devnet still shows the payments of earlier runs.
        first = 1000 + 20 * run
        owners = await owners_who_claimed(world, parts, range(first, first + 20))
        await earn(world, parts, owners)
        for kind in ("reply_dropped_before", "reply_dropped_after", "server_error_after", "rate_limited"):
            world.devnet.fault(kind, times=None, chance=0.1)
            world.devnet.fault(kind, times=None, chance=0.05, path="/info")
        world.devnet.fault("rows_late", times=None, chance=0.3, seconds=1.0)
        world.devnet.fault("rows_twice", times=None, chance=0.3)
        treasury = Treasury(
            world.redis_url,
            parts.books.access.url("treasury"),
            parts.signer.access.url("treasury"),
            world.devnet.url,
            world.platform.address.lower(),
            PAID,
        )
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
