"""The ledger in Redis keeps the rules for any number of processes, and answers its callers."""

import asyncio

import pytest

from azu.errors import InsufficientBalance, LedgerError, TransferConflict, Unavailable
from azu.money.ledger.audit import audit
from azu.money.ledger.records import BALANCES, ENTRIES, EXPIRIES, HOLDS, JOURNAL
from azu.money.ledger.redis import RedisLedger
from azu.money.ledger.rules import Result
from azu.money.ledger.transfers import CHAIN, Transfer, user_available, user_reserved, worker_earned
from azu.redis_client import connect_redis
from azu.units import MAX_LAMPORTS
from tests.builders import ALICE, BOB, OWNERS
from tests.money.ledger import moves
from tests.money.ledger.opened import apply_all, open_ledger, with_ledger


def test_a_job_is_reserved_and_settled(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        await apply_all(ledger, moves.deposit(500), moves.reserve("job-1", 300))
        assert await ledger.balance(user_available(ALICE)) == 200
        assert await ledger.balance(user_reserved(ALICE)) == 300
        await ledger.apply(moves.settle("job-1", 100, w0=80))
        assert await ledger.balances() == {
            CHAIN: -500,
            "platform": 20,
            user_available(ALICE): 400,
            user_reserved(ALICE): 0,
            worker_earned(OWNERS[0]): 80,
        }

    with_ledger(redis_url, scenario)


def test_an_account_without_entries_holds_nothing(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        assert await ledger.balance(user_available(ALICE)) == 0
        assert await ledger.balances() == {}
        assert await ledger.reservation("job-1") is None
        assert await ledger.result("deposit:0x01") is None

    with_ledger(redis_url, scenario)


def test_amounts_that_a_double_cannot_hold_stay_exact(redis_url: str) -> None:
    odd = 2**53 + 1

    async def scenario(ledger: RedisLedger) -> None:
        await apply_all(ledger, moves.deposit(MAX_LAMPORTS), moves.reserve("job-1", odd))
        assert await ledger.balance(user_available(ALICE)) == MAX_LAMPORTS - odd
        with pytest.raises(InsufficientBalance):
            await ledger.apply(moves.reserve("job-2", MAX_LAMPORTS - odd + 1))
        await ledger.apply(moves.reserve("job-2", MAX_LAMPORTS - odd))
        await ledger.apply(moves.settle("job-1", odd, w0=odd - 1))
        assert await ledger.balance(worker_earned(OWNERS[0])) == 2**53

    with_ledger(redis_url, scenario)


def test_a_repeated_transfer_returns_its_first_result(redis_url: str) -> None:
    history = (moves.deposit(500), moves.reserve("job-1", 300), moves.settle("job-1", 100, w0=80))

    async def scenario(ledger: RedisLedger) -> None:
        first = await apply_all(ledger, *history)
        balances = await ledger.balances()
        again = await apply_all(ledger, *history)
        assert [result.repeated for result in first] == [False] * 3
        assert again == [Result(result.entry, repeated=True) for result in first]
        assert [await ledger.result(transfer.id) for transfer in history] == first
        assert await ledger.balances() == balances

    with_ledger(redis_url, scenario)


def test_an_id_used_again_for_another_transfer_changes_nothing(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        await ledger.apply(moves.deposit(500))
        with pytest.raises(TransferConflict):
            await ledger.apply(moves.deposit(501))
        assert await ledger.balance(user_available(ALICE)) == 500

    with_ledger(redis_url, scenario)


def test_a_reservation_has_its_amount_and_the_transfer_that_ended_it(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        await apply_all(ledger, moves.deposit(500), moves.reserve("job-1", 300, expires_at_ms=7))
        reservation = await ledger.reservation("job-1")
        assert reservation is not None
        assert (reservation.address, reservation.lamports, reservation.expires_at_ms) == (ALICE, 300, 7)
        assert reservation.ended_by is None
        await ledger.apply(moves.release("job-1"))
        ended = await ledger.reservation("job-1")
        assert ended is not None
        assert ended.ended_by == "release:job-1"

    with_ledger(redis_url, scenario)


def test_open_reservations_are_listed_once_they_expire(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        await ledger.apply(moves.deposit(500))
        for job, expires_at_ms in (("late", 3_000), ("early", 1_000), ("settled", 1_500), ("due", 2_000)):
            await ledger.apply(moves.reserve(job, 10, expires_at_ms=expires_at_ms))
        await ledger.apply(moves.settle("settled", 5))
        assert [reservation.job_id for reservation in await ledger.expired(2_000)] == ["early", "due"]
        await ledger.apply(moves.expire("early"))
        assert [reservation.job_id for reservation in await ledger.expired(2_000)] == ["due"]
        assert await ledger.expired(999) == []

    with_ledger(redis_url, scenario)


def test_an_ended_reservation_does_not_expire_though_it_was_read_as_open(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        redis = connect_redis(redis_url)
        await apply_all(ledger, moves.deposit(500), moves.reserve("job-1", 10), moves.release("job-1"))
        # As if the job had ended between the two reads of the list.
        await redis.zadd(EXPIRIES, {"job:job-1": 1_000})
        await redis.aclose()
        assert await ledger.expired(2_000) == []

    with_ledger(redis_url, scenario)


def test_a_balance_beyond_a_redis_counter_is_refused_without_a_write(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        await apply_all(ledger, *(moves.deposit(MAX_LAMPORTS, tx_hash=f"0x{number}") for number in range(92)))
        with pytest.raises(LedgerError, match="does not allow"):
            await ledger.apply(moves.deposit(MAX_LAMPORTS, tx_hash="0xff"))
        assert (await audit(await ledger.snapshot(), ledger.journal())).agrees

    with_ledger(redis_url, scenario)


def test_the_journal_has_every_applied_transfer_in_order_and_no_other(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        done = await apply_all(
            ledger, *(moves.deposit(number, tx_hash=f"0x{number}") for number in range(1, 1_002))
        )
        with pytest.raises(InsufficientBalance):
            await ledger.apply(moves.reserve("job-1", 10**9))
        entries = [entry async for entry in ledger.journal()]
        assert entries == [result.entry for result in done]
        assert [entry.number for entry in entries] == list(range(1, 1_002))
        assert all(entry.at_ms > 1.7e12 for entry in entries)
        assert [entry.number async for entry in ledger.journal(after=999)] == [1_000, 1_001]
        assert [entry async for entry in ledger.journal(after=1_001)] == []

    with_ledger(redis_url, scenario)


def test_of_a_thousand_concurrent_reservations_the_balance_covers_ten_succeed(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        await ledger.apply(moves.deposit(1_000))
        async with open_ledger(redis_url) as other:
            outcomes = await asyncio.gather(
                *(
                    (ledger if number % 2 else other).apply(moves.reserve(f"job-{number}", 100))
                    for number in range(1_000)
                ),
                return_exceptions=True,
            )
        assert sum(isinstance(outcome, Result) for outcome in outcomes) == 10
        assert sum(isinstance(outcome, InsufficientBalance) for outcome in outcomes) == 990
        assert await ledger.balance(user_available(ALICE)) == 0
        assert await ledger.balance(user_reserved(ALICE)) == 1_000

    with_ledger(redis_url, scenario)


def test_a_thousand_concurrent_copies_of_one_deposit_credit_once(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        results = await asyncio.gather(*(ledger.apply(moves.deposit(7)) for _ in range(1_000)))
        assert sum(not result.repeated for result in results) == 1
        assert len({result.entry.at_ms for result in results}) == 1
        assert await ledger.balance(user_available(ALICE)) == 7

    with_ledger(redis_url, scenario)


def test_of_many_concurrent_ends_of_one_reservation_one_succeeds(redis_url: str) -> None:
    ends: list[Transfer] = [moves.settle("job-1", 100, w0=80), moves.release("job-1"), moves.expire("job-1")]

    async def scenario(ledger: RedisLedger) -> None:
        # A second end would take the other job's money, if it could be written.
        await apply_all(ledger, moves.deposit(500), moves.reserve("job-1", 100), moves.reserve("other", 400))
        # With all connections open, every caller reads the open hold before the first write.
        await asyncio.gather(*(ledger.balance(CHAIN) for _ in range(200)))
        outcomes = await asyncio.gather(*map(ledger.apply, ends * 50), return_exceptions=True)
        done = [outcome for outcome in outcomes if isinstance(outcome, Result)]
        lost = [outcome for outcome in outcomes if not isinstance(outcome, Result)]
        assert len({result.entry.transfer.id for result in done}) == 1
        assert [result.repeated for result in done].count(False) == 1
        assert len(done) == 50
        assert all(isinstance(error, LedgerError) and error.code == "hold_ended" for error in lost)
        assert (await audit(await ledger.snapshot(), ledger.journal())).agrees

    with_ledger(redis_url, scenario)


@pytest.mark.parametrize("key", [BALANCES, ENTRIES, HOLDS, JOURNAL, EXPIRIES])
def test_a_key_overwritten_by_hand_stops_the_ledger_before_it_writes(redis_url: str, key: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        redis = connect_redis(redis_url)
        await ledger.apply(moves.deposit(500))
        await redis.rename(key, "saved") if await redis.exists(key) else None
        await redis.set(key, "spoiled")
        with pytest.raises(LedgerError):
            await ledger.apply(moves.reserve("job-1", 300))
        await redis.delete(key)
        await redis.rename("saved", key) if await redis.exists("saved") else None
        await redis.aclose()
        assert await ledger.balances() == {CHAIN: -500, user_available(ALICE): 500}
        assert [entry.number async for entry in ledger.journal()] == [1]
        assert await ledger.reservation("job-1") is None

    with_ledger(redis_url, scenario)


@pytest.mark.parametrize("balance", ["-5", "many", "1.5", ""])
def test_a_balance_damaged_by_hand_is_not_used(redis_url: str, balance: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        redis = connect_redis(redis_url)
        await ledger.apply(moves.deposit(500))
        await redis.hset(BALANCES, user_available(ALICE), balance)
        with pytest.raises((LedgerError, InsufficientBalance)):
            await ledger.apply(moves.reserve("job-1", 3))
        assert await redis.hgetall(BALANCES) == {CHAIN: "-500", user_available(ALICE): balance}
        await redis.aclose()

    with_ledger(redis_url, scenario)


def test_a_journal_with_entries_added_by_hand_gets_no_more(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        redis = connect_redis(redis_url)
        await ledger.apply(moves.deposit(500))
        await redis.xadd(JOURNAL, {"by": "hand"})
        with pytest.raises(LedgerError):
            await ledger.apply(moves.reserve("job-1", 3))
        await redis.aclose()
        assert await ledger.balance(user_available(ALICE)) == 500
        with pytest.raises(LedgerError):
            _ = [entry async for entry in ledger.journal()]

    with_ledger(redis_url, scenario)


def test_a_redis_that_does_not_answer_is_unavailable() -> None:
    async def scenario(ledger: RedisLedger) -> None:
        with pytest.raises(Unavailable):
            await ledger.apply(moves.deposit(1))

    with_ledger("redis://127.0.0.1:1/0", scenario)


def test_several_balances_are_read_at_one_moment(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        await apply_all(ledger, moves.deposit(100), moves.reserve("job-1", 30))
        accounts = user_reserved(ALICE), user_available(ALICE), user_available(BOB)
        assert await ledger.balances_of(*accounts) == (30, 70, 0)

    with_ledger(redis_url, scenario)
