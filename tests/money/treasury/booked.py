"""Workers' earnings in a real ledger, and what must hold once they are paid."""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import replace

from eth_account import Account

from azu.auth.signatures import sign_claim
from azu.devnet.chain import USDC
from azu.money.ledger.transfers import worker_earned, worker_paid, worker_paying
from azu.units import LAMPORTS_PER_HYPE
from tests.money.ledger import moves
from tests.money.treasury.world import Open, World

# Worker number n earns this amount plus n lamports.
PAID = 20_000_000


async def owners_who_claimed(world: World, parts: Open, keys: Iterable[int]) -> list[str]:
    """Have the addresses of these private keys claim their earnings, and return them."""
    platform = world.platform.address.lower()
    accounts = [Account.from_key(f"0x{key:064x}") for key in keys]
    for account in accounts:
        await parts.ledger.claim_earnings(account.address.lower(), sign_claim(account, platform))
    return [account.address.lower() for account in accounts]


def fund_platform(world: World) -> None:
    """Give the platform HYPE to pay with, and dollars for the fees of new accounts."""
    world.devnet.fund(world.platform.address, 10**11)
    world.devnet.fund(world.platform.address, 10**11, token=USDC.full_id)


async def earn(world: World, parts: Open, addresses: list[str]) -> None:
    """Have a user deposit, and book a job for every worker whose whole charge goes to the worker."""
    amounts = [PAID + index for index in range(len(addresses))]
    payer = world.payer(sum(amounts) + LAMPORTS_PER_HYPE)
    user = payer.address.lower()
    await parts.deposit(payer, sum(amounts))
    await parts.book(moves.open_key(user))
    for index, (address, lamports) in enumerate(zip(addresses, amounts, strict=True)):
        await parts.book(
            moves.reserve(f"{index}", lamports, address=user),
            replace(moves.settle(f"{index}", lamports), platform_lamports=0, shares={address: lamports}),
        )


async def all_paid(parts: Open, addresses: list[str], timeout_s: float) -> bool:
    """Wait until the ledger says that every worker was paid and nothing is open."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        balances = await parts.balances()
        arrived = all(balances.get(worker_paid(address), 0) for address in addresses)
        if arrived and await parts.outbox.open() == ():
            return True
        await asyncio.sleep(0.05)
    return False


async def assert_paid_once(world: World, parts: Open, addresses: list[str]) -> None:
    """The chain's ledger shows every worker exactly one payment of what it earned, and so do the books."""
    balances = await parts.balances()
    assert sum(balances.values()) == 0
    for index, address in enumerate(addresses):
        rows = world.devnet.info("userNonFundingLedgerUpdates", address, startTime=0)
        assert [row["delta"]["amount"] for row in rows] == [f"0.20{index:06d}".rstrip("0")], address
        assert balances[worker_paid(address)] == PAID + index
        assert balances.get(worker_earned(address)) is balances.get(worker_paying(address)) is None
