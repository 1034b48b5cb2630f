"""A treasury signs nothing while Redis knows less than it answered, also after its own restart."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from azu.errors import ConfigurationError, Unavailable
from azu.money.treasury.memory import Memory
from azu.money.treasury.outbox import Payout
from azu.money.treasury.payouts import AmountOwed, Payer, PayoutTimeouts
from tests.builders import ALICE
from tests.money.chain.running import RunningDevnet, fresh_address
from tests.money.ledger import moves
from tests.money.treasury.booked import PAID, earn, fund_platform
from tests.money.treasury.simulated import NoWithdrawals
from tests.money.treasury.world import Open, World
from tests.redis_server import Rewindable


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Rewindable]:
    rewindable = Rewindable.start(tmp_path / "redis")
    yield rewindable
    rewindable.server.kill()


@pytest.fixture
def world(store: Rewindable, devnet_server: RunningDevnet, tmp_path: Path) -> World:
    return World(devnet_server, store.server.url, folder=tmp_path / "ledger")


def payer(parts: Open, memory: Memory) -> Payer:
    return Payer(
        parts.chain,
        parts.ledger,
        parts.outbox,
        NoWithdrawals(),
        parts.platform,
        PayoutTimeouts(),
        on_refused=lambda _: None,
        remember=memory.keep,
    )


def test_a_payout_that_redis_forgot_is_not_signed_again(
    world: World, store: Rewindable, tmp_path: Path
) -> None:
    owner, file = fresh_address(), tmp_path / "treasury.json"
    fund_platform(world)

    def received() -> int:
        return len(world.devnet.info("userNonFundingLedgerUpdates", owner, startTime=0))

    async def before(parts: Open) -> None:
        memory = Memory(file, parts.ledger, parts.outbox)
        assert await memory.may_sign()
        await earn(parts, [owner])
        await parts.book(moves.claim(owner))
        await payer(parts, memory).plan([AmountOwed(owner, PAID)], since_ms=0)
        position = store.position()
        await payer(parts, memory).advance()
        assert received() == 1
        store.rewind(position)
        # In the same process, which goes on without a look at its memory.
        await payer(parts, memory).advance()
        assert received() == 1

    async def after(parts: Open) -> None:
        memory = Memory(file, parts.ledger, parts.outbox)
        assert not await memory.may_sign()
        with pytest.raises(Unavailable):
            memory.keep()
        await payer(parts, memory).advance()
        assert received() == 1
        assert await parts.ledger.loss() > 0

    world.run(before)
    world.run(after)
    world.run(after)


def test_a_treasury_signs_again_once_the_admin_has_accepted_the_loss(
    world: World, store: Rewindable, tmp_path: Path
) -> None:
    file = tmp_path / "treasury.json"

    async def lose(parts: Open) -> None:
        memory = Memory(file, parts.ledger, parts.outbox)
        await parts.book(moves.deposit(1))
        position = store.position()
        await parts.book(moves.deposit(900, tx_hash="0x3"), moves.open_key())
        memory.keep()
        store.rewind(position)
        assert not await memory.may_sign()

    async def go_on(parts: Open) -> None:
        memory = Memory(file, parts.ledger, parts.outbox)
        assert not await memory.may_sign()
        # Jobs go on meanwhile.
        await parts.book(moves.deposit(100, tx_hash="0x02"))
        await parts.ledger.accept_loss(2)
        assert await asyncio.gather(memory.may_sign(), memory.may_sign()) == [True, True]
        memory.keep()

    async def later(parts: Open) -> None:
        assert await Memory(file, parts.ledger, parts.outbox).may_sign()
        assert await parts.ledger.loss() == 0

    for scenario in (lose, go_on, later):
        world.run(scenario)


def test_a_note_that_redis_lost_too_is_written_again(world: World, store: Rewindable) -> None:
    async def scenario(parts: Open) -> None:
        memory = Memory(None, parts.ledger, parts.outbox)
        await parts.book(moves.deposit(1))
        position = store.position()
        await parts.book(moves.deposit(900, tx_hash="0x3"))
        for _ in range(2):
            store.rewind(position)
            assert not await memory.may_sign()

    world.run(scenario)


def test_states_of_payouts_alone_are_missed_too(world: World, store: Rewindable, tmp_path: Path) -> None:
    async def scenario(parts: Open) -> None:
        memory = Memory(tmp_path / "treasury.json", parts.ledger, parts.outbox)
        payout = Payout(payout_id="payout:1", address=ALICE, lamports=5, planned_at_ms=1, since_ms=0)
        await parts.outbox.add(payout)
        position = store.position()
        for reason in ("first", "second"):
            failed = payout.failed(reason)
            assert await parts.outbox.replace(payout, failed)
            payout = failed
        memory.keep()
        store.rewind(position)

        assert not await memory.may_sign()
        assert await parts.ledger.loss() == 2
        await parts.ledger.accept_loss(2)
        assert await memory.may_sign()

    world.run(scenario)


def test_a_deposit_that_redis_lost_is_credited_again(world: World, store: Rewindable) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        await parts.watcher.poll()
        position = store.position()
        await parts.pay_platform(alice, 500)
        await parts.watcher.poll()
        assert await parts.available(alice) == 500
        store.rewind(position)
        await parts.watcher.poll()
        assert await parts.available(alice) == 500

    world.run(scenario)


def test_a_damaged_file_is_refused_by_name(world: World, tmp_path: Path) -> None:
    file = tmp_path / "treasury.json"
    file.write_text("{")

    async def scenario(parts: Open) -> None:
        with pytest.raises(ConfigurationError, match=r"treasury\.json cannot be read"):
            Memory(file, parts.ledger, parts.outbox)

    world.run(scenario)
