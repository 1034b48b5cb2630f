"""A Redis that knows less than it answered is noticed, and nothing but the admin's word makes that right."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from azu.errors import Conflict
from azu.money.ledger.losses import Mark, entries_lost
from azu.money.ledger.redis import RedisLedger
from tests.money.ledger import moves
from tests.money.ledger.opened import apply_all
from tests.redis_server import Rewindable


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Rewindable]:
    rewindable = Rewindable.start(tmp_path / "redis")
    yield rewindable
    rewindable.server.kill()


@pytest.mark.parametrize(
    ("mark", "found_number", "length", "lost"),
    [
        (Mark(), 0, 0, 0),
        (Mark(), 0, 9, 0),
        (Mark(7, "t7"), 7, 7, 0),
        (Mark(7, "t7"), 7, 9, 0),
        (Mark(7, "t7"), 0, 4, 3),
        (Mark(7, "t7"), 0, 0, 7),
        (Mark(7, "t7"), 0, 7, 1),
        (Mark(7, "t7"), 0, 12, 1),
        (Mark(7, "t7"), 5, 12, 1),
    ],
)
def test_what_is_gone_is_counted_from_the_entry_that_was_answered_last(
    mark: Mark, found_number: int, length: int, lost: int
) -> None:
    assert entries_lost(mark, found_number, length) == lost


def test_the_ledger_goes_on_after_a_loss_and_every_process_hears_of_it_once(store: Rewindable) -> None:
    async def scenario() -> None:
        busy, idle, late = (RedisLedger.from_url(store.server.url) for _ in range(3))
        await apply_all(late, moves.deposit(900))
        await apply_all(busy, moves.deposit(500, tx_hash="0x02"))
        assert await busy.losses.look() is None
        position = store.position()
        await apply_all(late, moves.reserve("job-2", 50))
        await apply_all(busy, moves.reserve("job-1", 300), moves.settle("job-1", 100, w0=80))
        store.rewind(position)

        await apply_all(busy, moves.reserve("job-3", 10))

        loss = await idle.losses.look()
        assert loss is not None
        assert (loss.entries, loss.payout_writes, loss.is_accepted) == (3, 0, False)
        with pytest.raises(Conflict, match="went back by 3"):
            await idle.losses.accept(2)
        await idle.losses.accept(3)
        assert (await busy.losses.look() or loss).is_accepted
        await busy.losses.settle()
        # It knows an entry that is gone; the admin has accepted that.
        assert await late.losses.look() is None
        await apply_all(late, moves.reserve("job-4", 10))
        with pytest.raises(Conflict, match="nothing to accept"):
            await idle.losses.accept(3)

        store.rewind(position)
        assert await late.losses.look() is not None, "another loss"

    asyncio.run(scenario())


def test_a_loss_is_noticed_though_others_wrote_as_much_again(store: Rewindable) -> None:
    async def scenario() -> None:
        one, other = (RedisLedger.from_url(store.server.url) for _ in range(2))
        await apply_all(one, moves.deposit(900))
        position = store.position()
        await apply_all(one, moves.reserve("job-1", 50))
        store.rewind(position)
        await apply_all(other, *(moves.reserve(f"job-{number}", 10) for number in range(2, 6)))

        await apply_all(one, moves.reserve("job-6", 10))

        assert (await other.losses.look()) is not None

    asyncio.run(scenario())


def test_a_loss_that_grows_after_it_was_accepted_has_to_be_accepted_again(store: Rewindable) -> None:
    async def scenario() -> None:
        one, other = (RedisLedger.from_url(store.server.url) for _ in range(2))
        await apply_all(one, moves.deposit(900))
        position = store.position()
        await apply_all(one, moves.reserve("job-1", 50))
        await apply_all(other, moves.reserve("job-2", 50))
        store.rewind(position)
        await one.losses.look()
        await one.losses.accept(1)

        loss = await other.losses.look()

        assert loss is not None
        assert (loss.entries, loss.is_accepted) == (2, False)

    asyncio.run(scenario())
