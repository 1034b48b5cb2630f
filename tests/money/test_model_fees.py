"""The fee for a model that the network does not have: set aside, then given back or charged."""

import asyncio
from dataclasses import replace

import pytest

from azu.auth.signatures import ReverseJob, sign_command
from azu.clock import wall_clock_ms
from azu.errors import InsufficientBalance, InvalidRequest, Unavailable
from azu.money.books import Books
from azu.money.ledger.entry import Result
from azu.money.ledger.transfers import Release, Transfer
from azu.money.model_fees import fee_lamports
from azu.protocol.job import FinishReason, JobEnding, JobState
from azu.units import GIB
from tests.money.accounts import BEARER
from tests.money.serving import PLATFORM, TERMS, ServedBooks
from tests.money.test_books import ADDRESS, ADMIN, open_account, play, reserve, settle

NOW_MS = wall_clock_ms() - 3_600_000  # far from the machine's clock: a slow run changes nothing
DAY_MS = 86_400_000
FEES = replace(TERMS, fetch_lamports_per_gib=200, fetch_unused_ms=DAY_MS)


async def ask(books: Books, fetch_id: str = "fetch-1", model_id: str = "test/model") -> int:
    return await books.reserve_fetch(BEARER, fetch_id, model_id=model_id, num_bytes=GIB)


def test_a_fee_is_set_aside_once_and_goes_back_with_the_first_charged_job_of_the_model(
    redis_url: str,
) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        assert [await ask(books), await ask(books), await ask(books, "fetch-2")] == [200, 200, 0]
        await ask(books, "fetch-3", "another/model")
        assert (await books.balance(ADDRESS)).reserved_lamports == 400
        await reserve(books)
        await settle(books, tokens=0)
        assert (await books.balance(ADDRESS)).reserved_lamports == 400, "nothing was charged"
        await reserve(books, "job-2")
        await settle(books, "job-2")
        balance = await books.balance(ADDRESS)
        assert (balance.available_lamports, balance.reserved_lamports) == (720, 200)

    play(redis_url, scenario, terms=FEES)


def test_first_requests_at_the_same_moment_set_one_fee_aside(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books, 10_000)
        asked = await asyncio.gather(*(ask(books, f"fetch-{number}") for number in range(8)))
        assert sorted(asked) == [0] * 7 + [200]
        assert (await books.balance(ADDRESS)).reserved_lamports == 200

    play(redis_url, scenario, terms=FEES)


def test_a_fee_goes_back_with_the_repeated_end_of_a_job_where_the_first_call_broke_off(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(books: Books, served: ServedBooks) -> None:
        await open_account(books)
        await ask(books)
        await reserve(books)
        ledger = await served.bookkeeper.ledger()
        apply = ledger.apply

        async def until_a_release(transfer: Transfer) -> Result:
            if isinstance(transfer, Release):
                raise Unavailable("Redis is away")
            return await apply(transfer)

        with monkeypatch.context() as broken:
            broken.setattr(ledger, "apply", until_a_release)
            with pytest.raises(Unavailable):
                await settle(books)
        assert (await books.balance(ADDRESS)).reserved_lamports == 200
        await settle(books)
        assert (await books.balance(ADDRESS)).reserved_lamports == 0

    play(redis_url, scenario, terms=FEES)


def test_the_fee_of_a_model_that_the_network_has_no_room_for_goes_back(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        await ask(books)
        await ask(books, "fetch-2", "another/model")
        for number, code in enumerate(("job_lost", "registry_full")):
            assert (await books.balance(ADDRESS)).reserved_lamports == 400
            await reserve(books, f"job-{number}")
            ending = JobEnding(JobState.FAILED, FinishReason.ERROR, error={"message": "", "code": code})
            await books.settle(f"job-{number}", prompt_tokens=0, completion_tokens=0, work={}, ending=ending)
        assert (await books.balance(ADDRESS)).reserved_lamports == 200
        await books.give_fees_back("another/model")
        assert (await books.balance(ADDRESS)).reserved_lamports == 0

    play(redis_url, scenario, terms=FEES)


def test_the_fee_of_a_model_that_was_not_used_in_time_is_the_platforms(redis_url: str) -> None:
    clock = [NOW_MS]

    async def scenario(books: Books, served: ServedBooks) -> None:
        await open_account(books, now_ms=NOW_MS)
        await ask(books)
        clock[0] += DAY_MS - 1
        await books.hear_time(clock[0])
        await served.bookkeeper.charge_unused()
        assert (await books.balance(ADDRESS)).reserved_lamports == 200
        clock[0] += 1
        for _ in range(2):
            await served.bookkeeper.charge_unused()
        balance = await books.balance(ADDRESS)
        assert (balance.available_lamports, balance.reserved_lamports) == (800, 0)
        assert (await served.bookkeeper.ledger()).state.balance("platform") == 200
        assert await ask(books) == 200, "a repeated call is answered as before"
        assert (await books.balance(ADDRESS)).reserved_lamports == 0

    play(redis_url, scenario, terms=FEES, now_ms=lambda: clock[0])


def test_a_charged_fee_is_reversed_until_it_has_matured(redis_url: str) -> None:
    clock = [NOW_MS]

    async def scenario(books: Books, served: ServedBooks) -> None:
        await open_account(books, now_ms=NOW_MS)
        await ask(books)
        clock[0] += DAY_MS
        await books.hear_time(clock[0])
        await served.bookkeeper.charge_unused()
        (found,) = (await books.reversible(ADDRESS)).jobs
        assert (found.job_id, found.accounts) == ("fetch-1", {"platform": 200})
        command = ReverseJob(job_id="fetch-1", nonce=1, expires_at_ms=clock[0] + 1)
        await books.command(sign_command(ADMIN, command, PLATFORM))
        assert (await books.balance(ADDRESS)).available_lamports == 1_000

    terms = replace(FEES, maturity_ms=1_000, admins=(ADMIN.address.lower(),))
    play(redis_url, scenario, terms=terms, now_ms=lambda: clock[0])


def test_no_fee_is_for_more_bytes_than_a_model_has(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books, 10**9)
        for num_bytes in (-1, 2**43):
            with pytest.raises(InvalidRequest):
                await books.reserve_fetch(BEARER, "fetch-1", model_id="m", num_bytes=num_bytes)

    play(redis_url, scenario, terms=FEES)


def test_only_the_books_end_a_fee_and_a_job_has_no_fees_id(redis_url: str) -> None:
    clock = [NOW_MS]

    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books, now_ms=NOW_MS)
        await ask(books)
        clock[0] += DAY_MS
        assert await books.overdue() == ()
        await books.expire("fetch-1")
        with pytest.raises(Exception, match="nothing is reserved"):
            await settle(books, "fetch-1")
        assert (await books.balance(ADDRESS)).reserved_lamports == 200
        with pytest.raises(InvalidRequest):
            await reserve(books, "fetch-2")
        with pytest.raises(InvalidRequest):
            await ask(books, "job-2")

    play(redis_url, scenario, terms=FEES, now_ms=lambda: clock[0])


def test_an_account_that_cannot_set_the_fee_aside_is_refused(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books, 199)
        with pytest.raises(InsufficientBalance):
            await ask(books)

    play(redis_url, scenario, terms=FEES)


def test_a_fee_is_rounded_up() -> None:
    assert [fee_lamports(size, 1_000) for size in (1, GIB, GIB + 1)] == [1, 1_000, 1_001]
    assert fee_lamports(GIB, 0) == 0
