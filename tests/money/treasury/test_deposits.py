import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from eth_account import Account
from hyperliquid.exchange import Exchange

from azu.devnet.chain import SECOND_HYPE
from azu.errors import RateLimited
from azu.money.chain.port import LedgerTransfer, TxDetails
from azu.money.chain.wallet import send_hype
from azu.money.ledger.transfers import CHAIN, SUSPENSE
from azu.money.treasury.deposits import DepositWatcher, agrees, deposit_status
from azu.money.treasury.request_reply import CreditState, DepositStatus
from azu.units import LAMPORTS_PER_HYPE
from tests.few import few
from tests.money.treasury.world import Open, World

ALICE, PLATFORM = "0x" + "a1" * 20, "0x" + "0f" * 20
HYPE = "HYPE:0x7317beb7cceed72ef0b346074cc8e7ab"
HASH = "0x" + "12" * 32
ROW = LedgerTransfer(
    time_ms=1,
    hash=HASH,
    sender=ALICE,
    destination=PLATFORM,
    token_name="HYPE",
    amount="5.0",
    to_spot=True,
    nonce=7,
)
ACTION = {
    "type": "sendAsset",
    "destination": PLATFORM,
    "sourceDex": "spot",
    "destinationDex": "spot",
    "token": HYPE,
    "amount": "5",
    "fromSubAccount": "",
}


def judged(error: str | None = None, **changes: Any) -> CreditState:
    details = TxDetails(hash=HASH, time_ms=1, user=ALICE, action=ACTION | changes, error=error)
    return deposit_status(details, platforms=(PLATFORM,), hype=HYPE).state


def test_hype_sent_to_the_platform_is_a_deposit() -> None:
    status = deposit_status(TxDetails(HASH, 1, ALICE, ACTION, None), platforms=(PLATFORM,), hype=HYPE)

    assert (status.state, status.sender, status.lamports) == (
        CreditState.PENDING,
        ALICE,
        500_000_000,
    )
    assert agrees(ROW, status)


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "order"},
        {"type": "usdSend"},
        {"destination": ALICE},
        {"destination": None},
        {"destinationDex": "xyz"},
        {"token": "HYPE:0xfa15e000fa15e000fa15e000fa15e000"},
        {"token": "HYPE"},
        {"fromSubAccount": ALICE},
        {"amount": "0.000000001"},
        {"amount": "nan"},
        {"amount": None},
        {"error": "Insufficient balance for token transfer"},
    ],
)
def test_everything_else_is_rejected(changes: dict[str, Any]) -> None:
    assert judged(**changes) is CreditState.REJECTED


@pytest.mark.parametrize("changes", [{"sender": PLATFORM}, {"amount": "5.00000001"}, {"amount": "x"}])
def test_a_row_has_to_agree_with_its_action(changes: dict[str, Any]) -> None:
    status = deposit_status(TxDetails(HASH, 1, ALICE, ACTION, None), platforms=(PLATFORM,), hype=HYPE)

    assert not agrees(replace(ROW, **changes), status)


BOB = "0x" + "b0" * 20


def test_a_transfer_to_the_platform_is_credited_to_its_sender(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        tx_hash = await parts.pay_platform(alice, 123_456_789)
        await parts.watcher.poll()

        assert await parts.available(alice) == 123_456_789
        assert await parts.ledger.result(f"deposit:{tx_hash}") is not None

    world.run(scenario)


@pytest.mark.parametrize(
    ("kind", "options"),
    few(
        [
            ("rows_twice", {"times": None}),
            ("rows_late", {"seconds": 0.6, "times": 2}),
            ("rate_limited", {"path": "/info", "times": 3}),
            ("rate_limited", {"path": "/explorer", "times": 3}),
            ("reply_dropped_after", {"path": "/info", "times": 3}),
            ("server_error_before", {"path": "/explorer", "times": 3}),
            ("delay", {"path": "/info", "times": 3, "seconds": 0.3}),
            ("restart", {"seconds": 0.7}),
        ],
        2,
    ),
)
def test_every_deposit_is_credited_once_under_a_fault(
    world: World, kind: str, options: dict[str, object]
) -> None:
    alice, carol = world.payer(), world.payer()

    async def scenario(parts: Open) -> None:
        if kind == "rows_late":
            world.devnet.fault(kind, **options)
        # One after the other for each payer; the first rows appear after the last.
        for lamports in (1, 20, 300):
            for payer in (alice, carol):
                await parts.pay_platform(payer, lamports)
        if kind != "rows_late":
            world.devnet.fault(kind, **options)
        for _ in range(4):
            await parts.watcher.poll()
            await asyncio.sleep(0.2)

        assert (await parts.available(alice), await parts.available(carol)) == (321, 321)
        assert (await parts.balances())[CHAIN] == -642

    world.run(scenario)


def test_a_row_that_is_later_than_the_cursor_is_credited(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        await parts.pay_platform(alice, 1)  # activates the platform's account
        world.devnet.fault("rows_late", seconds=1.0)
        late = asyncio.create_task(parts.pay_platform(alice, 20))
        await asyncio.sleep(0.3)
        await parts.pay_platform(alice, 300)
        await parts.watcher.poll()
        before = await parts.available(alice)
        await late
        await parts.watcher.poll()

        assert (before, await parts.available(alice)) == (301, 321)

    world.run(scenario)


def test_other_rows_than_deposits_are_not_credited(world: World) -> None:
    alice, platform = world.payer(), world.platform.address
    world.devnet.fault("second_hype")
    world.devnet.fund(alice.address, 5, token=SECOND_HYPE.full_id)
    world.devnet.fund(platform, 7_000)  # by the faucet: a row, but not a transfer

    async def scenario(parts: Open) -> None:
        exchange = Exchange(alice, world.devnet.url, timeout=5)
        assert exchange.send_asset(platform, "spot", "spot", SECOND_HYPE.full_id, "0.00000005") == {
            "status": "ok",
            "response": {"type": "default"},
        }
        exchange.send_asset(platform, "spot", "spot", "USDC:0x6d1e7cde53ba9467b783cb7c530ce054", "1")
        await send_hype(parts.chain, alice, BOB, 11)
        await send_hype(parts.chain, parts.platform, alice.address, 13)  # from the platform
        await parts.watcher.poll()

        # Of what left without a payout, and to an address that had nothing, the platform owes all.
        assert await parts.balances() == {"chain": 13, "platform": -13}

    world.run(scenario)


CONTRACT = "0x" + "c0" * 20
SETTLED_MS = 800


def quick(parts: Open, chain: object | None = None) -> DepositWatcher:
    """Return a watcher that does not wait two minutes for a row without an action."""
    return DepositWatcher(
        chain or parts.chain,  # type: ignore[arg-type]
        parts.ledger,
        parts.cursor,
        parts.uncredited,
        platform=parts.platform.address.lower(),
        settled_ms=SETTLED_MS,
    )


async def polled(watcher: DepositWatcher, times: int = 12) -> None:
    for _ in range(times):
        await watcher.poll()
        await asyncio.sleep(0.15)


@pytest.mark.prove
def test_rows_of_a_contract_are_set_aside_once_each_when_they_are_old_enough(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    alice, platform = world.payer(), world.platform.address

    async def scenario(parts: Open) -> None:
        await parts.pay_platform(alice, 5)
        time_ms = world.devnet.contract(platform, 70, sender=CONTRACT, count=2)
        watcher = quick(parts)
        await watcher.poll()
        await watcher.poll()
        assert await parts.uncredited.all() == ()
        assert await parts.cursor.read() <= time_ms
        await parts.pay_platform(alice, 6)
        await polled(watcher)

        listed = sorted(one.row for one in await parts.uncredited.all())
        assert listed == [f"{time_ms}:0x0:{CONTRACT}:-:0.0000007:{nth}" for nth in (0, 1)]
        assert await parts.available(alice) == 11
        assert await parts.cursor.read() > time_ms
        # Another process finds the same.
        await polled(quick(parts))
        assert len(await parts.uncredited.all()) == 2
        assert sum("it came from HyperEVM" in record.message for record in caplog.records) == 2

    world.run(scenario)


@pytest.mark.prove
def test_a_row_without_an_action_may_be_of_a_token_with_the_same_name(world: World) -> None:
    platform = world.platform.address
    world.devnet.fault("second_hype")

    async def scenario(parts: Open) -> None:
        world.devnet.contract(platform, 70, sender=CONTRACT, token=SECOND_HYPE.full_id)
        await polled(quick(parts))
        (listed,) = await parts.uncredited.all()
        assert "another token" in listed.reason
        assert (await parts.ledger.held()).suspense == ()
        # More than all of them together is HYPE.
        world.devnet.contract(platform, 71, sender=CONTRACT)
        await polled(quick(parts))
        (suspended,) = (await parts.ledger.held()).suspense
        assert suspended.lamports == 71

    world.run(scenario)


def test_a_row_that_the_chain_repeats_is_not_set_aside_beside_itself(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        world.devnet.fault("rows_twice", times=None)
        await parts.pay_platform(alice, 5)
        await polled(quick(parts))

        assert await parts.available(alice) == 5
        assert await parts.uncredited.all() == ()

    world.run(scenario)


def test_a_deposit_in_a_crowded_millisecond_is_found_in_its_senders_ledger(world: World) -> None:
    alice, platform = world.payer(), world.platform.address
    exchange = Exchange(alice, world.devnet.url, timeout=5)

    async def scenario(parts: Open) -> None:
        time_ms = world.devnet.contract(platform, 1, sender=CONTRACT, count=600)
        world.devnet.fault("same_time")
        exchange.send_asset(platform, "spot", "spot", world.devnet.network.hype, "0.00000005")
        sent = world.devnet.info("userNonFundingLedgerUpdates", alice.address.lower(), startTime=time_ms)
        [tx_hash] = [row["hash"] for row in sent if row["delta"].get("destination") == platform.lower()]
        await parts.watcher.poll()
        assert await parts.available(alice) == 0

        status = await parts.watcher.check(tx_hash)
        assert (status.state, status.lamports) == (CreditState.CREDITED, 5)
        await parts.watcher.check(tx_hash)
        assert await parts.available(alice) == 5

    world.run(scenario)


def test_what_several_keys_signed_is_set_aside_at_once(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        await parts.pay_platform(alice, 5)
        signed = replace(ROW, destination=parts.platform.address.lower(), time_ms=3)

        class WithOthers:
            network = parts.chain.network

            async def ledger_updates(self, user: str, start_ms: int) -> AsyncIterator[tuple[object, ...]]:
                yield (signed,)
                async for page in parts.chain.ledger_updates(user, start_ms):
                    yield page

            async def tx_details(self, tx_hash: str) -> TxDetails | None:
                if tx_hash != HASH:
                    return await parts.chain.tx_details(tx_hash)
                sent = ACTION | {"token": parts.chain.network.hype}
                action = {"type": "multiSig", "payload": {"multiSigUser": ALICE, "action": sent}}
                return TxDetails(HASH, 3, ALICE, action, None)

        watcher = quick(parts, WithOthers())
        await watcher.poll()
        await watcher.poll()

        balances = await parts.balances()
        assert (balances[CHAIN], balances[SUSPENSE]) == (-5 * LAMPORTS_PER_HYPE - 5, 5 * LAMPORTS_PER_HYPE)
        [one] = await parts.uncredited.all()
        assert (one.time_ms, one.hash, one.sender, one.amount) == (3, HASH, ALICE, "5.0")
        assert one.reason.startswith("several keys signed it")

    world.run(scenario)


def test_a_long_history_is_read_once_to_its_end(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        await parts.pay_platform(alice, 1)
        for _ in range(520):
            world.devnet.fund(world.platform.address, 1)
        await parts.pay_platform(alice, 2)
        await parts.watcher.poll()

        assert await parts.available(alice) == 3
        [*_, last] = world.devnet.info("userNonFundingLedgerUpdates", alice.address, startTime=0)
        assert await parts.cursor.read() == last["time"]

    world.run(scenario)


def test_a_row_that_fails_stays_undecided_and_delays_no_other(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        odd = await parts.pay_platform(alice, 5)
        await parts.pay_platform(alice, 7)

        class Failing(DepositWatcher):
            async def _decide(self, row: LedgerTransfer) -> bool:
                if row.hash == odd:
                    raise ZeroDivisionError
                return await super()._decide(row)

        platform = parts.platform.address.lower()
        await Failing(parts.chain, parts.ledger, parts.cursor, parts.uncredited, platform=platform).poll()
        assert await parts.available(alice) == 7
        await parts.watcher.poll()
        assert await parts.available(alice) == 12

    world.run(scenario)


def test_a_watcher_killed_before_its_cursor_moved_credits_nothing_twice(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        await parts.pay_platform(alice, 5)

        class Killed(Exception):
            pass

        class DyingCursor:
            async def read(self) -> int:
                return await parts.cursor.read()

            async def advance(self, time_ms: int) -> None:
                raise Killed

        platform = parts.platform.address.lower()
        with pytest.raises(Killed):
            await DepositWatcher(
                parts.chain, parts.ledger, DyingCursor(), parts.uncredited, platform=platform
            ).poll()
        assert await parts.available(alice) == 5
        again = DepositWatcher(parts.chain, parts.ledger, parts.cursor, parts.uncredited, platform=platform)
        await again.poll()
        await again.poll()

        assert await parts.available(alice) == 5

    world.run(scenario)


def test_two_watchers_credit_once(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        for lamports in range(1, 6):
            await parts.pay_platform(alice, lamports)
        platform = parts.platform.address.lower()
        watchers = [
            DepositWatcher(parts.chain, parts.ledger, parts.cursor, parts.uncredited, platform=platform)
            for _ in range(3)
        ]
        await asyncio.gather(*(watcher.poll() for watcher in watchers))

        assert await parts.available(alice) == 15

    world.run(scenario)


def test_a_row_the_explorer_does_not_know_yet_holds_the_cursor(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        tx_hash = await parts.pay_platform(alice, 5)
        details = await parts.chain.tx_details(tx_hash)
        assert details is not None
        explorer_knows = False

        class SlowExplorer:
            network = parts.chain.network
            ledger_updates = staticmethod(parts.chain.ledger_updates)

            async def tx_details(self, _hash: str) -> object:
                return details if explorer_knows else None

        watcher = DepositWatcher(
            SlowExplorer(),  # type: ignore[arg-type]
            parts.ledger,
            parts.cursor,
            parts.uncredited,
            platform=parts.platform.address.lower(),
        )
        await watcher.poll()
        assert await parts.available(alice) == 0
        assert await parts.cursor.read() <= details.time_ms
        explorer_knows = True
        await watcher.poll()

        assert await parts.available(alice) == 5

    world.run(scenario)


def test_a_check_of_a_hash_returns_what_it_is(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        good = await parts.pay_platform(alice, 5)
        elsewhere = await send_hype(parts.chain, alice, BOB, 5)
        stranger = Account.create().address.lower()

        credited = await parts.watcher.check(good)
        assert (credited.state, credited.sender, credited.lamports) == (
            CreditState.CREDITED,
            alice.address.lower(),
            5,
        )
        assert await parts.available(alice) == 5
        assert (await parts.watcher.check(elsewhere)).state is CreditState.REJECTED
        assert (await parts.watcher.check("0x" + "12" * 32)).state is CreditState.UNKNOWN
        assert (await parts.balances()).get(f"user:{stranger}:available", 0) == 0

    world.run(scenario)


def test_callers_have_the_explorer_asked_so_often_in_an_hour_and_deposits_are_credited_without_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("azu.money.treasury.deposits._LOOKS", 2)
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        now_ms = [10_000_000]
        watcher = DepositWatcher(
            parts.chain,
            parts.ledger,
            parts.cursor,
            parts.uncredited,
            platform=world.platform.address.lower(),
            now_ms=lambda: now_ms[0],
        )

        async def look(number: int) -> CreditState:
            now_ms[0] += 1_000
            return (await watcher.check(f"0x{number:064x}")).state

        assert [await look(number) for number in range(1, 5)] == [
            CreditState.UNKNOWN, CreditState.UNKNOWN, CreditState.BUSY, CreditState.BUSY
        ]  # fmt: skip
        tx_hash = await parts.pay_platform(alice, 5_000)
        assert (await watcher.check(tx_hash)).state is CreditState.BUSY
        await watcher.poll()
        assert (await watcher.check(tx_hash)).state is CreditState.CREDITED
        now_ms[0] += 3_600_000 - 5_000
        assert [await look(number) for number in range(1, 5)] == [
            CreditState.BUSY, CreditState.UNKNOWN, CreditState.UNKNOWN, CreditState.BUSY
        ]  # fmt: skip

        async def busy(_: str) -> DepositStatus:
            return DepositStatus(CreditState.BUSY)

        asking = asyncio.create_task(parts.deposits.ask(f"0x{7:064x}", alice.address, 30.0))
        while not await parts.deposits.serve(busy, 1):
            await parts.deposits.wait()
        with pytest.raises(RateLimited, match="credited also if no one asks"):
            await asking

    world.run(scenario)
