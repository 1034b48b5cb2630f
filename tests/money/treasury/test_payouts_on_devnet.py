"""Payouts over a real devnet and a real Redis while the connections fail at random."""

import asyncio
import random
from collections import Counter

import httpx
import pytest

from azu.errors import ChainError
from azu.money.chain.api import ChainClient
from azu.money.treasury.payouts import Payer, PayoutTimeouts
from azu.money.treasury.planning import PayoutSelector, Threshold
from tests.money.chain.running import running_devnet
from tests.money.treasury.booked import (
    PAID,
    all_paid,
    assert_paid_once,
    earn,
    fund_platform,
    owners_who_claimed,
)
from tests.money.treasury.simulated import NoWithdrawals
from tests.money.treasury.world import SEED, Open, World

FAULTS = (
    "reply_dropped_before",
    "reply_dropped_after",
    "server_error_before",
    "server_error_after",
    "rate_limited",
    "unprocessable",
)


def break_everything(world: World, chance: float) -> None:
    for kind in FAULTS:
        world.devnet.fault(kind, times=None, chance=chance)
    for kind in ("reply_dropped_after", "rate_limited", "server_error_before"):
        world.devnet.fault(kind, times=None, chance=chance, path="/info")
    world.devnet.fault("delay", times=None, chance=chance / 4, seconds=1.5)
    world.devnet.fault("rows_late", times=None, chance=0.5, seconds=1.0)
    world.devnet.fault("rows_twice", times=None, chance=0.5)
    world.devnet.fault("second_hype")


async def restart_for_ever(world: World, dice: random.Random) -> None:
    """Cut every connection to the devnet for a moment, again and again."""
    while True:
        await asyncio.sleep(dice.uniform(0.5, 3.0))
        await asyncio.to_thread(world.devnet.fault, "restart", seconds=dice.uniform(0.05, 0.3))


async def pay_for_ever(world: World, parts: Open) -> None:
    """Pay as the treasury's process does, with shorter timeouts."""
    # Shorter than the devnet's delay.
    chain = ChainClient(world.devnet.network, httpx.AsyncClient(timeout=1.0))
    platform = world.platform.address.lower()
    selector = PayoutSelector(chain, parts.ledger, (platform,), Threshold(PAID, PAID))
    payer = Payer(
        chain,
        parts.ledger,
        parts.outbox,
        NoWithdrawals(),
        parts.signer.signer,
        PayoutTimeouts(conclude_ms=3_000),
        platforms=(platform,),
        on_refused=lambda _address: None,
    )
    try:
        while True:
            try:
                await payer.advance()
                open_lamports = {payout.address: payout.lamports for payout in await parts.outbox.open()}
                await payer.plan(await selector.select(open_lamports, 20), await parts.cursor.read())
            except ChainError:
                continue
            await asyncio.sleep(0.02)
    finally:
        await chain.close()


def every_worker_is_paid_once(world: World, workers: int, chance: float, seed: int = SEED) -> None:
    fund_platform(world)

    async def scenario(parts: Open) -> None:
        keys = random.Random(f"{world.platform.address}").sample(range(1, 10**9), workers)
        owners = await owners_who_claimed(world, parts, keys)
        await earn(world, parts, owners)
        break_everything(world, chance)
        tasks = [asyncio.create_task(pay_for_ever(world, parts)) for _ in range(2)]
        tasks.append(asyncio.create_task(restart_for_ever(world, random.Random(seed))))
        try:
            assert await all_paid(parts, owners, 240.0)
        finally:
            for task in tasks:
                task.cancel()
        world.devnet.no_faults()
        # Rows that are still late would show a second payment.
        await asyncio.sleep(1.2)
        await assert_paid_once(world, parts, owners)

    world.run(scenario)


@pytest.mark.prove
def test_two_payers_without_a_lease_pay_every_worker_once_while_everything_fails(world: World) -> None:
    every_worker_is_paid_once(world, workers=4, chance=0.1)


@pytest.mark.prove
@pytest.mark.parametrize("run", range(20))
def test_fifty_workers_are_paid_once_while_everything_fails(
    redis_url: str, figures: Counter[str], run: int
) -> None:
    with running_devnet(seed=SEED + run) as devnet:
        every_worker_is_paid_once(World(devnet, redis_url), workers=50, chance=0.1, seed=SEED + run)
    figures["workers paid exactly once on the devnet's ledger"] += 50
