"""What books and outbox do not know: foreign transfers, payouts that were lost, revenue that is taken."""

import asyncio
from dataclasses import replace

from eth_account.signers.local import LocalAccount

from azu.auth.signatures import TakeRevenue, sign_command
from azu.clock import wall_clock_ms
from azu.money.chain.wallet import send_hype
from azu.money.ledger.transfers import PLATFORM, user_available
from azu.money.treasury.outbox import PayoutState
from azu.money.treasury.payouts import Payer, PayoutTimeouts
from azu.money.treasury.planning import AmountOwed
from azu.money.treasury.withdrawals import RedisWithdrawals
from azu.redis_client import connect_redis
from tests.money.ledger import moves
from tests.money.serving import TERMS
from tests.money.signer.serving import ADMIN
from tests.money.treasury.booked import PAID, earn, fund_platform, owners_who_claimed
from tests.money.treasury.world import Open, World

HELD = 5 * PAID


def payer(world: World, parts: Open) -> Payer:
    return Payer(
        parts.chain,
        parts.ledger,
        parts.outbox,
        RedisWithdrawals(connect_redis(world.redis_url)),
        parts.signer.signer,
        PayoutTimeouts(conclude_ms=500),
        platforms=(world.platform.address.lower(),),
        on_refused=lambda _address: None,
        gives_up=parts.watcher.has_left_otherwise,
    )


async def steal(world: World, parts: Open, to: LocalAccount, lamports: int) -> None:
    """Send from the platform's account as another process that has its key."""
    await send_hype(parts.chain, world.platform, to.address, lamports)


async def paid_out(parts: Open, treasury: Payer) -> None:
    """Advance until nothing is open."""
    for _ in range(300):
        await treasury.advance()
        if await parts.outbox.open() == ():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(await parts.outbox.open())


def received(world: World, address: str) -> list[str]:
    rows = world.devnet.info("userNonFundingLedgerUpdates", address, startTime=0)
    platform = world.platform.address.lower()
    return [row["delta"]["amount"] for row in rows if row["delta"].get("user") == platform]


def test_a_transfer_that_no_payout_explains_is_taken_from_its_address_once(world: World) -> None:
    alice = world.payer()
    address = alice.address.lower()

    async def scenario(parts: Open) -> None:
        # The chain drops the ledger of an account that is empty.
        fund_platform(world)
        await parts.deposit(alice, HELD)
        assert await looked(parts) == ()
        await steal(world, parts, alice, 2 * PAID)
        for _ in range(2):
            await parts.watcher.poll()
        assert await parts.available(alice) == HELD - 2 * PAID
        # Of what the address did not have the platform owes the rest.
        await steal(world, parts, alice, 3 * PAID)
        await steal(world, parts, alice, PAID)
        await parts.watcher.poll()
        balances = await parts.balances()
        assert (balances.get(user_available(address)), balances[PLATFORM]) == (None, -PAID)
        assert "another process sent" in (await looked(parts))[0]

    world.run(scenario)


async def looked(parts: Open) -> tuple[str, ...]:
    await parts.signer.signer.look()
    return (await parts.signer.signer.status()).findings


def test_a_payout_whose_address_was_paid_otherwise_is_given_up_before_that_is_booked(world: World) -> None:
    fund_platform(world)

    async def scenario(parts: Open) -> None:
        [owner] = await owners_who_claimed(world, parts, [77])
        await earn(world, parts, [owner])
        treasury = payer(world, parts)
        await treasury.plan([AmountOwed(owner, PAID)], since_ms=0)
        [planned] = await parts.outbox.open()
        # The money is set aside; then the other process sends.
        await parts.book(replace(planned, nonce=wall_clock_ms() // 4 * 4).booking)
        world.devnet.fund(owner, 1)
        await send_hype(parts.chain, world.platform, owner, PAID)
        await parts.watcher.poll()
        assert (await parts.ledger.earnings(owner)).paying_lamports == PAID, "it is not booked yet"
        await paid_out(parts, treasury)
        await parts.watcher.poll()

        earnings = await parts.ledger.earnings(owner)
        assert (earnings.earned_lamports, earnings.paying_lamports) == (0, 0)
        assert received(world, owner) == ["0.2"], "the other process's alone"

    world.run(scenario)


def test_a_payout_that_the_outbox_lost_is_taken_up_and_paid_once(world: World) -> None:
    fund_platform(world)

    async def scenario(parts: Open) -> None:
        [owner] = await owners_who_claimed(world, parts, [78])
        await earn(world, parts, [owner])
        treasury = payer(world, parts)
        await treasury.plan([AmountOwed(owner, PAID)], since_ms=0)
        world.devnet.fault("rows_late", seconds=0.5)
        await treasury.advance()
        [sent] = await parts.outbox.open()
        assert sent.state is PayoutState.ACCEPTED
        await parts.outbox.remove(sent)

        again = payer(world, parts)
        await again.resume(await parts.ledger.open_payouts())
        [resumed] = await parts.outbox.open()
        assert (resumed.state, resumed.nonce) == (PayoutState.PLANNED, sent.nonce)
        await paid_out(parts, again)

        assert received(world, owner) == ["0.2"]
        assert (await parts.ledger.earnings(owner)).paid_lamports == PAID
        # The books know their own payout on the chain.
        before = await parts.balances()
        await parts.watcher.poll()
        assert await parts.balances() == before
        await again.resume(await parts.ledger.open_payouts())
        assert await parts.outbox.open() == ()

    world.run(scenario)


def test_revenue_is_sent_where_an_admins_wallet_says(world: World) -> None:
    admin_world = replace(world, terms=replace(TERMS, admins=(ADMIN.address.lower(),)))
    fund_platform(world)
    alice, owner = world.payer(), world.payer().address.lower()

    async def scenario(parts: Open) -> None:
        user, platform = alice.address.lower(), world.platform.address.lower()
        await parts.deposit(alice, HELD)
        await parts.book(
            moves.open_key(user), moves.reserve("job-1", HELD, address=user), moves.settle("job-1", HELD)
        )
        asked = TakeRevenue(address=owner, lamports=PAID, nonce=1, expires_at_ms=wall_clock_ms() + 60_000)
        await parts.ledger.command(sign_command(ADMIN, asked, platform))
        assert (await parts.ledger.totals()).charged_lamports == HELD
        treasury = payer(world, parts)
        await treasury.resume(await parts.ledger.open_payouts())
        await paid_out(parts, treasury)

        assert received(world, owner) == ["0.2"]
        assert (await parts.balances())[PLATFORM] == HELD - PAID
        assert (await parts.ledger.totals()).charged_lamports == HELD
        assert await looked(parts) == ()

    admin_world.run(scenario)
