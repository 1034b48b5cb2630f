"""The ledger in Redis: each transfer once, by one writer, in a journal that shows every change."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from azu.errors import (
    InsufficientBalance,
    InternalError,
    JournalFault,
    LedgerError,
    TransferConflict,
    Unavailable,
)
from azu.money.ledger.entry import Result
from azu.money.ledger.journal import JOURNAL, Line, RedisJournal, next_hash
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.seals import Seals
from azu.money.ledger.transfers import (
    Deposit,
    LossAccepted,
    Transfer,
    WriterOpened,
    user_available,
    worker_earned,
)
from azu.redis_client import connect_redis
from azu.units import MAX_LAMPORTS
from tests.builders import ALICE, OWNERS
from tests.money.ledger import moves
from tests.money.ledger.books import apply_each, open_books, with_books
from tests.redis_server import Rewindable

HISTORY = (
    moves.open_key(),
    moves.deposit(500),
    moves.reserve("job-1", 300),
    moves.settle("job-1", 100, w0=80),
)
AVAILABLE = user_available(ALICE)


def rows(url: str) -> list[tuple[str, dict[str, str]]]:
    with Redis.from_url(url, decode_responses=True) as redis:
        return redis.xrange(JOURNAL)  # type: ignore[return-value]


def write_again(url: str, changed: list[tuple[str, dict[str, str]]]) -> None:
    """Replace the journal by hand."""
    with Redis.from_url(url, decode_responses=True) as redis:
        redis.delete(JOURNAL)
        for stream_id, fields in changed:
            redis.xadd(JOURNAL, fields, id=stream_id)  # type: ignore[arg-type]


def test_a_job_is_reserved_and_settled(redis_url: str, tmp_path: Path) -> None:
    async def scenario(ledger: Ledger) -> None:
        await apply_each(ledger, *HISTORY)
        assert ledger.state.balance(AVAILABLE) == 400
        assert ledger.state.balance(worker_earned(OWNERS[0])) == 80
        await ledger.verify()
        assert (await ledger.audit()).agrees

    with_books(redis_url, tmp_path, scenario)


def test_the_books_come_back_from_the_journal_alone(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_books(redis_url, tmp_path) as ledger:
            await apply_each(ledger, *HISTORY, moves.reserve("job-2", 50))
            before, head = deepcopy(ledger.state), ledger.head
        async with open_books(redis_url, tmp_path) as again:
            before.facts["number"] += 1
            assert again.state == before
            assert again.head.number == head.number + 1, "the new writer"
            assert (await again.entry(head.number)).hash == head.hash
            assert again.lost == 0

    asyncio.run(scenario())
    with Redis.from_url(redis_url) as redis:
        assert redis.keys() == [JOURNAL.encode()], "nothing else is stored"


def test_amounts_that_a_double_cannot_hold_stay_exact(redis_url: str, tmp_path: Path) -> None:
    odd = 2**53 + 1

    async def scenario() -> None:
        async with open_books(redis_url, tmp_path) as ledger:
            await apply_each(ledger, HISTORY[0], moves.deposit(MAX_LAMPORTS), moves.reserve("job-1", odd))
            with pytest.raises(InsufficientBalance):
                await ledger.apply(moves.reserve("job-2", MAX_LAMPORTS - odd + 1))
            await ledger.apply(moves.settle("job-1", odd, w0=odd - 1))
        async with open_books(redis_url, tmp_path) as ledger:
            assert ledger.state.balance(AVAILABLE) == MAX_LAMPORTS - odd
            assert ledger.state.balance(worker_earned(OWNERS[0])) == 2**53

    asyncio.run(scenario())


def test_a_repeated_transfer_returns_its_first_result(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_books(redis_url, tmp_path) as ledger:
            first = await apply_each(ledger, *HISTORY)
            head = ledger.head
            repeated = [Result(result.entry, repeated=True) for result in first]
            assert [result.repeated for result in first] == [False] * 4
            assert await apply_each(ledger, *HISTORY) == repeated
            assert [await ledger.result(transfer.id) for transfer in HISTORY] == first
            assert ledger.head == head
            with pytest.raises(TransferConflict):
                await ledger.apply(moves.deposit(501))
            assert await ledger.result("deposit:0x09") is None
        async with open_books(redis_url, tmp_path) as ledger:
            assert await apply_each(ledger, *HISTORY) == repeated

    asyncio.run(scenario())


def test_a_transfer_that_is_refused_is_not_in_the_journal_and_may_come_again(
    redis_url: str, tmp_path: Path
) -> None:
    async def scenario(ledger: Ledger) -> None:
        await apply_each(ledger, HISTORY[0], HISTORY[1])
        head = ledger.head
        with pytest.raises(InsufficientBalance):
            await ledger.apply(moves.reserve("job-1", 501))
        assert ledger.head == head
        await ledger.apply(moves.deposit(1, tx_hash="0x02"))
        assert not (await ledger.apply(moves.reserve("job-1", 501))).repeated

    with_books(redis_url, tmp_path, scenario)


def test_a_transfer_that_cannot_be_worked_out_is_answered_alone(redis_url: str, tmp_path: Path) -> None:
    class Unknown(Deposit):
        """A kind for which there is no rule."""

    no_rule = Unknown(id="deposit:0x02", address=ALICE, lamports=1, at_ms=1)
    half_way = moves.deposit(7, tx_hash="0x03")
    object.__setattr__(half_way, "at_ms", "soon")  # found after its balances were changed

    async def scenario(ledger: Ledger) -> None:
        given = (moves.deposit(5), no_rule, half_way, moves.deposit(6, tx_hash="0x04"))
        done = await asyncio.gather(*map(ledger.apply, given), return_exceptions=True)
        assert [type(one) for one in done] == [Result, InternalError, InternalError, Result]
        assert ledger.state.balance(AVAILABLE) == 11
        assert (await ledger.audit()).agrees

    with_books(redis_url, tmp_path, scenario)


def test_an_end_after_the_end_is_told_from_an_end_of_nothing(redis_url: str, tmp_path: Path) -> None:
    async def scenario(ledger: Ledger) -> None:
        await apply_each(ledger, *HISTORY, moves.plan_withdrawal("p1", 5), moves.paid("p1"))
        for transfer, code in (
            (moves.release("job-1"), "hold_ended"),
            (moves.release("job-2"), "unknown_hold"),
            (moves.refused("p1"), "hold_ended"),
            (moves.refused("p2"), "unknown_hold"),
        ):
            with pytest.raises(LedgerError) as raised:
                await ledger.apply(transfer)
            assert raised.value.code == code

    with_books(redis_url, tmp_path, scenario)


def test_transfers_that_come_at_once_are_written_in_few_calls(redis_url: str, tmp_path: Path) -> None:
    async def scenario(ledger: Ledger) -> None:
        with Redis.from_url(redis_url) as redis:
            redis.config_resetstat()
            await asyncio.gather(
                *(ledger.apply(moves.deposit(1, tx_hash=f"0x{number}")) for number in range(1_000))
            )
            stats: Any = redis.info("commandstats")
        assert stats["cmdstat_xadd"]["calls"] == 1_000
        assert stats["cmdstat_evalsha"]["calls"] <= 5
        assert ledger.state.balance(AVAILABLE) == 1_000
        await ledger.verify()

    with_books(redis_url, tmp_path, scenario)


def test_of_a_thousand_concurrent_reservations_the_balance_covers_ten_succeed(
    redis_url: str, tmp_path: Path
) -> None:
    async def scenario(ledger: Ledger) -> None:
        await apply_each(ledger, moves.open_key(), moves.deposit(1_000))
        outcomes = await asyncio.gather(
            *(ledger.apply(moves.reserve(f"job-{number}", 100)) for number in range(1_000)),
            return_exceptions=True,
        )
        assert sum(isinstance(outcome, Result) for outcome in outcomes) == 10
        assert sum(isinstance(outcome, InsufficientBalance) for outcome in outcomes) == 990

    with_books(redis_url, tmp_path, scenario)


def test_a_thousand_concurrent_copies_of_one_deposit_credit_once(redis_url: str, tmp_path: Path) -> None:
    async def scenario(ledger: Ledger) -> None:
        results = await asyncio.gather(*(ledger.apply(moves.deposit(7)) for _ in range(1_000)))
        assert sum(not result.repeated for result in results) == 1
        assert len({result.entry.hash for result in results}) == 1
        assert ledger.state.balance(AVAILABLE) == 7
        other = await asyncio.gather(
            *(ledger.apply(moves.deposit(n, tx_hash="0x02")) for n in (1, 2)), return_exceptions=True
        )
        assert [type(outcome) for outcome in other] == [Result, TransferConflict]

    with_books(redis_url, tmp_path, scenario)


def test_of_many_concurrent_ends_of_one_reservation_one_succeeds(redis_url: str, tmp_path: Path) -> None:
    ends: list[Transfer] = [moves.settle("job-1", 100, w0=80), moves.release("job-1"), moves.expire("job-1")]

    async def scenario(ledger: Ledger) -> None:
        await apply_each(ledger, *HISTORY[:3])
        outcomes = await asyncio.gather(*map(ledger.apply, ends * 50), return_exceptions=True)
        done = [outcome for outcome in outcomes if isinstance(outcome, Result)]
        lost = [outcome for outcome in outcomes if not isinstance(outcome, Result)]
        assert len({result.entry.transfer.id for result in done}) == 1
        assert [result.repeated for result in done].count(False) == 1
        assert len(done) == 50
        assert all(isinstance(error, LedgerError) and error.code == "hold_ended" for error in lost)

    with_books(redis_url, tmp_path, scenario)


def test_a_caller_that_is_cancelled_disturbs_no_other(redis_url: str, tmp_path: Path) -> None:
    async def scenario(ledger: Ledger) -> None:
        calls = [asyncio.create_task(ledger.apply(moves.deposit(1, tx_hash=f"0x{n}"))) for n in range(20)]
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(outcome, Result) for outcome in outcomes[1::2])
        assert (await ledger.audit()).agrees

    with_books(redis_url, tmp_path, scenario)


def test_the_journal_has_every_applied_transfer_in_order(redis_url: str, tmp_path: Path) -> None:
    async def scenario(ledger: Ledger) -> None:
        first = ledger.head.number
        done = await asyncio.gather(
            *(ledger.apply(moves.deposit(number, tx_hash=f"0x{number}")) for number in range(1, 1_200))
        )
        entries = [entry async for entry in ledger.journal(after=first)]
        assert entries == [result.entry for result in done]
        assert [entry.number for entry in entries] == list(range(first + 1, first + 1_200))
        assert [entry.number async for entry in ledger.journal(after=first + 1_198)] == [first + 1_199]
        with pytest.raises(JournalFault, match="missing"):
            await ledger.entry(first + 1_200)

    with_books(redis_url, tmp_path, scenario)


def test_a_second_writer_stops_the_first(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_books(redis_url, tmp_path) as first:
            await apply_each(first, *HISTORY)
            async with open_books(redis_url, tmp_path) as second:
                for number in (2, 3):
                    with pytest.raises(JournalFault) as raised:
                        await first.apply(moves.deposit(1, tx_hash=f"0x0{number}"))
                    assert raised.value.code == "another_writer"
                await second.apply(moves.deposit(5, tx_hash="0x02"))
                assert second.state.balance(AVAILABLE) == 405
                await second.verify()

    asyncio.run(scenario())


class CutJournal(RedisJournal):
    """A journal whose connection is cut: before the script runs, after it, or so that it runs later."""

    cut = ""
    late: Callable[[], Awaitable[object]] | None = None

    async def append(self, head: Any, lines: Any) -> Any:
        cut, self.cut = self.cut, ""
        if cut == "after":
            await super().append(head, lines)
        if cut == "late":
            self.late = lambda: RedisJournal.append(self, head, lines)
        if cut:
            raise Unavailable("cut")
        return await super().append(head, lines)


@pytest.mark.parametrize("cut", ["before", "after", "late"])
def test_an_unknown_outcome_is_found_out_before_the_next_write(
    redis_url: str, tmp_path: Path, cut: str
) -> None:
    async def scenario() -> None:
        journal = CutJournal(connect_redis(redis_url))
        ledger = await Ledger.open(journal, Seals(tmp_path), lambda: 1)
        await apply_each(ledger, *HISTORY[:2])
        journal.cut = cut
        outcomes = await asyncio.gather(
            *(ledger.apply(moves.reserve(f"job-{number}", 100)) for number in range(3)),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 3
        assert ledger.state.reservations == {}
        await ledger.verify() if cut != "after" else None
        if journal.late is not None:
            await journal.late()
        again = await asyncio.gather(*(ledger.apply(moves.reserve(f"job-{n}", 100)) for n in range(4)))
        assert [result.repeated for result in again] == [cut != "before"] * 3 + [False]
        assert ledger.state.balance(AVAILABLE) == 100
        await ledger.verify()
        assert (await ledger.audit()).agrees
        await ledger.close()

    asyncio.run(scenario())


def test_a_late_write_after_another_is_refused(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        journal = CutJournal(connect_redis(redis_url))
        ledger = await Ledger.open(journal, Seals(tmp_path), lambda: 1)
        await apply_each(ledger, *HISTORY[:2])
        journal.cut = "late"
        with pytest.raises(Unavailable):
            await ledger.apply(moves.reserve("job-1", 100))
        await ledger.apply(moves.reserve("job-2", 50))
        assert journal.late is not None
        await journal.late()
        assert set(ledger.state.reservations) == {"job-2"}
        await ledger.verify()
        await ledger.apply(moves.reserve("job-3", 50))
        await ledger.close()

    asyncio.run(scenario())


def test_a_part_of_a_group_that_a_failed_script_left_is_taken_over(redis_url: str, tmp_path: Path) -> None:
    class HalfJournal(CutJournal):
        async def append(self, head: Any, lines: Any) -> Any:
            return await super().append(head, lines[:2] if self.cut else lines)

    async def scenario() -> None:
        journal = HalfJournal(connect_redis(redis_url))
        ledger = await Ledger.open(journal, Seals(tmp_path), lambda: 1)
        await apply_each(ledger, *HISTORY[:2])
        journal.cut = "after"
        jobs = [moves.reserve(f"job-{number}", 100) for number in range(4)]
        await asyncio.gather(*map(ledger.apply, jobs), return_exceptions=True)
        again = [await ledger.apply(job) for job in jobs]
        assert [result.repeated for result in again] == [True, True, False, False]
        await ledger.verify()
        await ledger.close()

    asyncio.run(scenario())


def test_a_redis_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(Unavailable):
            async with open_books("redis://127.0.0.1:1/0", tmp_path):
                pass

    asyncio.run(scenario())


def changed_deposit(fields: dict[str, str]) -> dict[str, str]:
    return fields | {"entry": fields["entry"].replace("500", "900")}


def chained_again(changed: list[tuple[str, dict[str, str]]]) -> list[tuple[str, dict[str, str]]]:
    """Give every row the hash that follows from the rows before it."""
    before, done = "", []
    for stream_id, fields in changed:
        before = next_hash(before, fields["entry"])
        done.append((stream_id, fields | {"hash": before}))
    return done


Rows = list[tuple[str, dict[str, str]]]
CHANGES: dict[str, Callable[[Rows], Rows]] = {
    "an old entry": lambda found: [
        (id_, changed_deposit(fields)) if id_ == "3-0" else (id_, fields) for id_, fields in found
    ],
    "a hash": lambda found: [*found[:2], (found[2][0], found[2][1] | {"hash": "f" * 64}), *found[3:]],
    "an entry left out": lambda found: [*found[:2], *found[3:]],
    "the first entry left out": lambda found: found[1:],
    "the last entry left out": lambda found: found[:-1],
    "an entry more": lambda found: [*found, ("99-0", found[-1][1])],
    "another number": lambda found: [*found, ("5-7", found[-1][1])],
    "fields of others": lambda found: [*found, ("99-0", {"by": "hand"})],
    "nothing left": lambda found: [],
    "a chain made again": lambda found: chained_again(
        [(id_, changed_deposit(fields)) if id_ == "3-0" else (id_, fields) for id_, fields in found]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_by_hand_is_found_while_the_ledger_runs(
    redis_url: str, tmp_path: Path, change: str
) -> None:
    async def scenario(ledger: Ledger) -> None:
        await apply_each(ledger, *HISTORY)
        await ledger.verify()
        write_again(redis_url, CHANGES[change](rows(redis_url)))
        with pytest.raises(JournalFault) as raised:
            await ledger.verify()
        assert raised.value.code == "journal_changed"
        assert not (await ledger.audit()).agrees

    with_books(redis_url, tmp_path, scenario)


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_by_hand_is_found_by_the_next_start(redis_url: str, tmp_path: Path, change: str) -> None:
    async def start(*transfers: Transfer) -> int:
        async with open_books(redis_url, tmp_path) as ledger:
            await apply_each(ledger, *transfers)
            return ledger.lost

    asyncio.run(start(*HISTORY))
    write_again(redis_url, CHANGES[change](rows(redis_url)))
    # What is whole in itself is a ledger that went back: it goes on, and the admin has to accept that.
    if change in ("the last entry left out", "nothing left", "a chain made again"):
        assert asyncio.run(start()) > 0
    else:
        with pytest.raises(JournalFault):
            asyncio.run(start())


def test_a_forged_entry_that_the_rules_forbid_is_refused_at_the_start(redis_url: str, tmp_path: Path) -> None:
    def overdrawn(found: Rows) -> Rows:
        forged = [(id_, dict(fields)) for id_, fields in found]
        content = json.loads(forged[3][1]["entry"])
        content["transfer"]["max_tokens"] = 9_000
        content["legs"] = [[account, 9_000 if n > 0 else -9_000] for account, n in content["legs"]]
        forged[3][1]["entry"] = json.dumps(content)
        return chained_again(forged)

    async def start() -> None:
        async with open_books(redis_url, tmp_path) as ledger:
            await apply_each(ledger, *HISTORY)

    asyncio.run(start())
    write_again(redis_url, overdrawn(rows(redis_url)))
    with pytest.raises(JournalFault, match="entry 4: the account holds"):
        asyncio.run(start())


def test_a_journal_written_by_hand_gets_no_more_entries(redis_url: str, tmp_path: Path) -> None:
    async def scenario(ledger: Ledger) -> None:
        await apply_each(ledger, *HISTORY)
        redis = connect_redis(redis_url)
        await redis.xadd(JOURNAL, {"by": "hand"})
        await redis.aclose()
        with pytest.raises(JournalFault):
            await ledger.apply(moves.deposit(3, tx_hash="0x03"))

    with_books(redis_url, tmp_path, scenario)


def test_a_store_that_goes_back_is_gone_on_with_and_says_so_until_that_is_accepted(tmp_path: Path) -> None:
    store = Rewindable.start(tmp_path / "redis")
    folder = tmp_path / "seals"

    async def scenario() -> None:
        async with open_books(store.server.url, folder) as ledger:
            await apply_each(ledger, *HISTORY[:2])
            position = store.position()
            await apply_each(ledger, *HISTORY[2:], moves.deposit(7, tx_hash="0x02"))
            store.rewind(position)
            await ledger.apply(moves.deposit(9, tx_hash="0x03"))
            assert ledger.lost == 3
            assert ledger.state.balance(AVAILABLE) == 509
            await ledger.verify()
            # What was lost may come again.
            assert not (await ledger.apply(HISTORY[2])).repeated
        async with open_books(store.server.url, folder) as ledger:
            assert ledger.lost == 3
            await ledger.apply(LossAccepted(id="accept", num_entries=3))
            assert ledger.lost == 0
        async with open_books(store.server.url, folder) as ledger:
            assert ledger.lost == 0

    asyncio.run(scenario())
    store.server.kill()


def test_a_store_that_went_back_between_two_runs_is_noticed_by_the_second(tmp_path: Path) -> None:
    store = Rewindable.start(tmp_path / "redis")
    folder = tmp_path / "seals"

    async def scenario() -> None:
        async with open_books(store.server.url, folder) as ledger:
            await apply_each(ledger, *HISTORY[:2])
            position = store.position()
            await apply_each(ledger, *HISTORY[2:])
        store.rewind(position)
        async with open_books(store.server.url, folder) as ledger:
            assert ledger.lost == 2

    asyncio.run(scenario())
    store.server.kill()


def test_every_writer_leaves_its_entry(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        for number in (1, 2):
            async with open_books(redis_url, tmp_path) as ledger:
                entry = await ledger.entry(ledger.head.number)
                assert isinstance(entry.transfer, WriterOpened)
                assert entry.number == number

    asyncio.run(scenario())


def test_a_line_is_not_an_entry_of_another_place(redis_url: str, tmp_path: Path) -> None:
    text = '{"number":2}'
    assert next_hash("a", text) != next_hash("b", text)
    assert Line(2, text, "h").head.hash == "h"
