"""Withdrawals over a real devnet and a real Redis: sent once, to the address that signed them."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.auth.signatures import Withdrawal, sign_withdrawal
from azu.clock import wall_clock_ms
from azu.devnet.chain import USDC
from azu.errors import ChainError, Conflict, NotFound
from azu.money.chain.rows import row_id
from azu.money.ledger.entry import Result
from azu.money.ledger.transfers import user_withdrawing
from azu.money.signer.views import PayoutKind
from azu.money.treasury.outbox import Payout
from azu.money.treasury.payouts import Payer, PayoutTimeouts
from azu.money.treasury.planning import PayoutSelector, Threshold, WithdrawalPlanner
from azu.money.treasury.withdrawals import (
    LEAST_LAMPORTS,
    RedisWithdrawals,
    SignedWithdrawal,
    WithdrawalState,
    WithdrawalStatus,
)
from azu.redis_client import connect_redis
from tests.builders import ALICE
from tests.few import few
from tests.money.ledger import moves
from tests.money.treasury.booked import fund_platform
from tests.money.treasury.world import Open, World

HELD = 5 * LEAST_LAMPORTS
THRESHOLD = Threshold(LEAST_LAMPORTS, 4 * LEAST_LAMPORTS)


def signed(
    world: World, account: LocalAccount, lamports: int, nonce: int = 1, life_ms: int = 60_000
) -> SignedWithdrawal:
    asked = Withdrawal(
        address=account.address.lower(),
        lamports=lamports,
        nonce=nonce,
        expires_at_ms=wall_clock_ms() + life_ms,
    )
    return SignedWithdrawal(asked, sign_withdrawal(account, asked, world.platform.address.lower()))


class Treasury:
    """The parts of the treasury that carry out withdrawals."""

    def __init__(self, world: World, parts: Open) -> None:
        platform = world.platform.address.lower()
        self.store = RedisWithdrawals(connect_redis(world.redis_url))
        self.ledger = parts.ledger
        selector = PayoutSelector(parts.chain, parts.ledger, (platform,), THRESHOLD)
        self.planner = WithdrawalPlanner(
            self.store, parts.ledger, parts.outbox, selector, parts.signer.signer, platforms=(platform,)
        )
        self.payer = Payer(
            parts.chain,
            parts.ledger,
            parts.outbox,
            self.store,
            parts.signer.signer,
            PayoutTimeouts(conclude_ms=1_500),
            platforms=(platform,),
            on_refused=lambda _address: None,
        )

    async def step(self) -> None:
        try:
            await self.payer.advance()
            await self.planner.plan(20, 0)
        except ChainError:
            await asyncio.sleep(0.05)

    async def until_decided(self, asked: SignedWithdrawal) -> tuple[WithdrawalState, str | None]:
        """Step until a withdrawal is final and no longer waits."""
        for _ in range(400):
            await self.step()
            status = await status_of(self.store, asked, self.ledger)
            decided = status.state in (WithdrawalState.PAID, WithdrawalState.REFUSED)
            if decided and asked not in await self.store.waiting():
                return status.state, status.reason
            await asyncio.sleep(0.02)
        raise AssertionError(status)


async def status_of(store: RedisWithdrawals, asked: SignedWithdrawal, ledger: Any) -> WithdrawalStatus:
    return await store.status(asked.withdrawal.address, asked.withdrawal.nonce, ledger.result)


def credited(world: World) -> LocalAccount:
    """Return an account that exists on the chain."""
    fund_platform(world)
    return world.payer()


async def credit_from_contract(world: World, parts: Open, account: LocalAccount) -> None:
    """Credit HELD to an account that is new to the chain: a contract sent it, an admin found the owner."""
    contract = "0x" + "c1" * 20
    world.devnet.contract(world.platform.address, HELD, sender=contract)
    platform = world.platform.address.lower()
    [row] = [
        row
        async for page in parts.chain.ledger_updates(platform, 0)
        for row in page
        if row.sender == contract
    ]
    await parts.book(
        moves.suspend(row_id(row), HELD, sender=contract, at_ms=row.time_ms),
        moves.credit_suspense(row_id(row), HELD, address=account.address.lower()),
    )


def received(world: World, account: LocalAccount) -> list[str]:
    rows = world.devnet.info("userNonFundingLedgerUpdates", account.address.lower(), startTime=0)
    platform = world.platform.address.lower()
    return [row["delta"]["amount"] for row in rows if row["delta"].get("user") == platform]


def test_a_new_address_whose_fee_the_platform_lacks_waits_and_delays_no_other(world: World) -> None:
    platform, new, known = world.platform.address, Account.create(), world.payer()
    # From a contract, so that the platform gets no dollars.
    world.devnet.contract(platform, 10**9, sender="0x" + "c0" * 20)

    async def scenario(parts: Open) -> None:
        treasury = Treasury(world, parts)
        asked = [signed(world, account, 4 * LEAST_LAMPORTS) for account in (new, known)]
        await parts.deposit(known, HELD)
        await credit_from_contract(world, parts, new)
        for one in asked:
            await treasury.store.hand_in(one)
        assert await treasury.until_decided(asked[1]) == (WithdrawalState.PAID, None)
        waiting = await status_of(treasury.store, asked[0], parts.ledger)
        assert waiting == WithdrawalStatus(WithdrawalState.WAITING)

        world.devnet.fund(platform, 10**8, token=USDC.full_id)
        assert await treasury.until_decided(asked[0]) == (WithdrawalState.PAID, None)
        assert received(world, new) == ["0.04"]

    world.run(scenario)


def test_a_withdrawal_arrives_once_however_often_it_is_handed_in(world: World) -> None:
    alice = credited(world)

    async def scenario(parts: Open) -> None:
        treasury = Treasury(world, parts)
        await parts.deposit(alice, HELD)
        asked = signed(world, alice, 3 * LEAST_LAMPORTS)
        await treasury.store.hand_in(asked)
        waiting = await status_of(treasury.store, asked, parts.ledger)
        assert waiting == WithdrawalStatus(WithdrawalState.WAITING)
        assert await treasury.until_decided(asked) == (WithdrawalState.PAID, None)

        for _ in range(3):
            await treasury.store.hand_in(asked)
            assert await treasury.until_decided(asked) == (WithdrawalState.PAID, None)

        assert received(world, alice) == ["0.03"]
        assert await parts.available(alice) == HELD - 3 * LEAST_LAMPORTS
        assert (await parts.balances()).get(user_withdrawing(alice.address.lower()), 0) == 0

    world.run(scenario)


@pytest.mark.parametrize(
    "kind", few(["reply_dropped_after", "reply_dropped_before", "server_error_after", "rows_late"])
)
def test_a_withdrawal_arrives_once_under_a_fault(world: World, kind: str) -> None:
    alice = credited(world)

    async def scenario(parts: Open) -> None:
        treasury = Treasury(world, parts)
        await parts.deposit(alice, HELD)
        world.devnet.fault(kind, times=2, seconds=0.5)
        asked = signed(world, alice, HELD)
        await treasury.store.hand_in(asked)

        assert await treasury.until_decided(asked) == (WithdrawalState.PAID, None)
        assert received(world, alice) == ["0.05"]
        assert await parts.available(alice) == 0

    world.run(scenario)


def test_a_withdrawal_against_the_rules_is_refused_and_moves_nothing(world: World) -> None:
    alice, mallory, newcomer = credited(world), Account.create(), Account.create()

    async def scenario(parts: Open) -> None:
        treasury = Treasury(world, parts)
        await parts.deposit(alice, HELD)
        await credit_from_contract(world, parts, newcomer)
        forged = signed(world, mallory, HELD, nonce=1)
        cases = {
            "signed": replace(forged, withdrawal=replace(forged.withdrawal, address=alice.address.lower())),
            "expired": signed(world, alice, HELD, nonce=2, life_ms=-1),
            "remove": signed(world, alice, LEAST_LAMPORTS - 1, nonce=3),
            "does not hold": signed(world, alice, HELD + 1, nonce=4),
            "new to the chain": signed(world, newcomer, LEAST_LAMPORTS, nonce=5),
        }
        for reason, asked in cases.items():
            await treasury.store.hand_in(asked)
            state, why = await treasury.until_decided(asked)
            assert state is WithdrawalState.REFUSED
            assert reason in str(why)

        assert (await parts.available(alice), await parts.available(newcomer)) == (HELD, HELD)
        assert received(world, alice) == received(world, newcomer) == []

    world.run(scenario)


def test_of_two_withdrawals_above_the_balance_one_is_refused(world: World) -> None:
    alice = credited(world)

    async def scenario(parts: Open) -> None:
        treasury = Treasury(world, parts)
        await parts.deposit(alice, HELD)
        first, second = (signed(world, alice, HELD, nonce=nonce) for nonce in (1, 2))
        await treasury.store.hand_in(first)
        with pytest.raises(Conflict, match="waits"):
            await treasury.store.hand_in(second)
        assert (await treasury.until_decided(first))[0] is WithdrawalState.PAID
        await treasury.store.hand_in(second)
        assert (await treasury.until_decided(second))[0] is WithdrawalState.REFUSED

        assert received(world, alice) == ["0.05"]

    world.run(scenario)


def test_one_address_does_not_delay_the_others(world: World) -> None:
    alice, bob = credited(world), world.payer()

    async def scenario(parts: Open) -> None:
        treasury = Treasury(world, parts)
        for account in (alice, bob):
            await parts.deposit(account, HELD)
        refused = 0
        for nonce in range(100):
            try:
                await treasury.store.hand_in(signed(world, alice, HELD, nonce=nonce))
            except Conflict:
                refused += 1
        asked = signed(world, bob, HELD)
        await treasury.store.hand_in(asked)

        assert refused == 99
        assert len(await treasury.store.waiting()) == 2
        assert (await treasury.until_decided(asked))[0] is WithdrawalState.PAID

    world.run(scenario)


def test_payouts_of_one_kind_take_no_room_of_another(world: World) -> None:
    alice, bob = credited(world), world.payer()

    async def scenario(parts: Open) -> None:
        treasury = Treasury(world, parts)
        # Earnings that the signer's limit lets wait, perhaps for a day.
        waits = Payout(payout_id="payout:1", address=ALICE, lamports=1, planned_at_ms=0, since_ms=0)
        await parts.outbox.add(waits)
        for account in (alice, bob):
            await parts.deposit(account, HELD)
            await treasury.store.hand_in(signed(world, account, HELD))

        await treasury.planner.plan(1, 0)

        kinds = [payout.kind for payout in await parts.outbox.open()]
        assert sorted(kinds) == [PayoutKind.EARNINGS, PayoutKind.WITHDRAWAL]

    world.run(scenario)


def test_what_was_refused_stays_refused_though_its_treasury_died_over_it(world: World) -> None:
    alice = credited(world)

    async def scenario(parts: Open) -> None:
        treasury = Treasury(world, parts)
        asked = signed(world, alice, HELD)
        await treasury.store.hand_in(asked)
        await treasury.planner.plan(20, 0)
        [planned] = await parts.outbox.open()
        # The treasury died here: the withdrawal is refused, its payout in the outbox. Then money arrives.
        await treasury.store.refuse(planned.payout_id, "the account does not hold so much")
        await parts.deposit(alice, HELD)

        assert (await treasury.until_decided(asked))[0] is WithdrawalState.REFUSED
        assert await parts.outbox.open() == ()
        assert await parts.available(alice) == HELD
        assert received(world, alice) == []

    world.run(scenario)


def test_a_withdrawal_that_another_process_plans_again_after_its_end_is_not_sent_again(world: World) -> None:
    alice = credited(world)

    async def scenario(parts: Open) -> None:
        treasury = Treasury(world, parts)
        await parts.deposit(alice, HELD)
        asked = signed(world, alice, LEAST_LAMPORTS)
        await treasury.store.hand_in(asked)
        while not await parts.outbox.open():
            await treasury.step()
        [planned] = await parts.outbox.open()
        as_planned = replace(planned, state=type(planned.state).PLANNED, nonce=0, body="", attempts=0)
        await treasury.until_decided(asked)

        # A process that hung since before the first payout was sent.
        assert await parts.outbox.add(as_planned)
        for _ in range(5):
            await treasury.step()

        assert await parts.outbox.open() == ()
        assert received(world, alice) == ["0.01"]

    world.run(scenario)


def test_a_withdrawal_has_a_status_at_every_moment(world: World) -> None:
    alice = credited(world)

    async def scenario(parts: Open) -> None:
        treasury = Treasury(world, parts)
        await parts.deposit(alice, HELD)
        asked = signed(world, alice, HELD)
        await treasury.store.hand_in(asked)

        class OvertakenLedger:
            """Answers, but first lets the treasury pay the withdrawal."""

            async def result(self, transfer_id: str) -> Result | None:
                answer = await parts.ledger.result(transfer_id)
                if transfer_id.endswith(":planned"):
                    await treasury.until_decided(asked)
                return answer

        assert await status_of(treasury.store, asked, OvertakenLedger())

    world.run(scenario)


def test_a_nonce_names_one_withdrawal(world: World) -> None:
    alice = credited(world)

    async def scenario(parts: Open) -> None:
        store = RedisWithdrawals(connect_redis(world.redis_url))
        await store.hand_in(signed(world, alice, HELD))
        with pytest.raises(Conflict):
            await store.hand_in(signed(world, alice, HELD - 1))
        with pytest.raises(NotFound):
            await status_of(store, signed(world, alice, HELD, nonce=9), parts.ledger)

    world.run(scenario)
