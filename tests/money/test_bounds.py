"""How many keys and nodes the books keep, and what makes room."""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.auth.signatures import Withdrawal, sign_claim, sign_withdrawal, withdrawal_id
from azu.clock import wall_clock_ms
from azu.errors import Forbidden, InsufficientBalance, RateLimited, Unauthenticated
from azu.money import overview
from azu.money.books import Books
from azu.money.treasury.withdrawals import LEAST_LAMPORTS
from tests.builders import OWNERS
from tests.money.accounts import fund, signed_key
from tests.money.ledger import moves
from tests.money.serving import PLATFORM, TERMS, ServedBooks
from tests.money.test_books import ADDRESS, open_account, play, reserve, settle

DAY_MS = 86_400_000
NOW_MS = wall_clock_ms() - 3_600_000  # far from the machine's clock: a slow run changes nothing
USERS: tuple[LocalAccount, ...] = tuple(Account.from_key(f"0x{number:064x}") for number in range(101, 108))


async def open_key(books: Books, number: int, now_ms: int = NOW_MS) -> None:
    await books.open_key(signed_key(USERS[number], f"secret-{number}", now_ms=now_ms))


def test_addresses_without_money_have_so_many_keys_together_and_keep_out_no_one_who_deposits(
    redis_url: str,
) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_key(books, 0)
        await open_key(books, 1)
        with pytest.raises(Forbidden, match=r"2 keys.*limits\.max_unfunded_keys") as full:
            await open_key(books, 2)
        assert full.value.code == "too_many_unfunded_keys"
        await fund(books, 5, USERS[2])
        await open_key(books, 2)
        # Who deposits later makes room.
        await fund(books, 5, USERS[0], "0x2")
        await open_key(books, 3)
        with pytest.raises(Forbidden):
            await open_key(books, 4)

    play(redis_url, scenario, terms=replace(TERMS, max_unfunded_keys=2), now_ms=lambda: NOW_MS)


def test_a_key_of_an_address_without_money_is_dropped_when_it_is_old(redis_url: str) -> None:
    clock = [NOW_MS]

    async def scenario(books: Books, served: ServedBooks) -> None:
        core = await served.bookkeeper.ledger()
        for number in range(5):
            await open_key(books, number)
        await fund(books, 5, USERS[1])
        # One lends, one has spent all that he had. To want to be paid costs nothing.
        await books.enrol_node("n", USERS[2].address.lower(), key_digest="k", name="n", work_bytes_per_s=0)
        await core.apply(moves.claim(USERS[3].address.lower()))
        spender, key = USERS[4].address.lower(), signed_key(USERS[4], "secret-4").key_id
        await core.apply(moves.deposit(10, address=spender, tx_hash="0x4"))
        await core.apply(moves.reserve("job-1", 10, address=spender, key_id=key))
        await core.apply(moves.settle("job-1", 10, w0=10))
        clock[0] += DAY_MS - 1
        await served.bookkeeper.drop_unfunded_keys()
        await books.key("secret-0")
        clock[0] += 1

        await served.bookkeeper.drop_unfunded_keys()

        for number in (0, 3):
            with pytest.raises(Unauthenticated):
                await books.key(f"secret-{number}")
        for number in (1, 2, 4):
            await books.key(f"secret-{number}")

    play(redis_url, scenario, now_ms=lambda: clock[0])


def test_a_large_theft_is_shown_before_small_jobs_and_what_is_left_out_is_counted(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "_MOST_REVERSIBLE", 2)

    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books, 2_000)
        for number, tokens in enumerate((1, 9, 2, 3)):
            await reserve(books, f"job-{number}")
            await settle(books, f"job-{number}", tokens)
        found = await books.reversible(ADDRESS)
        assert [one.job_id for one in found.jobs] == ["job-1", "job-3"]
        assert found.num_left_out == 2

    play(redis_url, scenario, terms=replace(TERMS, maturity_ms=DAY_MS))


def test_addresses_without_money_claim_so_often_and_keep_out_no_one_who_lends(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        async def claim(number: int) -> None:
            await books.claim_earnings(USERS[number].address.lower(), sign_claim(USERS[number], PLATFORM))

        await claim(0)
        with pytest.raises(Forbidden) as full:
            await claim(1)
        assert full.value.code == "too_many_claims"
        await claim(0)
        await books.enrol_node("n", USERS[1].address.lower(), key_digest="k", name="n", work_bytes_per_s=0)
        await claim(1)
        await fund(books, 5, USERS[0])
        await claim(2)

    play(redis_url, scenario, terms=replace(TERMS, max_unfunded_keys=1))


def test_an_address_withdraws_so_often_in_a_day(redis_url: str) -> None:
    clock = [NOW_MS]

    async def scenario(books: Books, served: ServedBooks) -> None:
        core, address = await served.bookkeeper.ledger(), USERS[0].address.lower()
        await fund(books, 100 * LEAST_LAMPORTS, USERS[0])

        def hand_in(nonce: int) -> Awaitable[object]:
            given = Withdrawal(
                address=address, lamports=LEAST_LAMPORTS, nonce=nonce, expires_at_ms=clock[0] + 60_000
            )
            return books.withdraw(given, sign_withdrawal(USERS[0], given, PLATFORM))

        for number in range(24):
            nonce = clock[0] - number
            await core.apply(
                moves.plan_withdrawal(
                    withdrawal_id(address, number), LEAST_LAMPORTS, address=address, nonce=nonce
                )
            )
        with pytest.raises(RateLimited) as refused:
            await hand_in(100)
        assert refused.value.code == "too_many_withdrawals"
        clock[0] += DAY_MS
        await hand_in(100)

    play(redis_url, scenario, now_ms=lambda: clock[0])


def test_old_keys_without_money_make_room_by_themselves(redis_url: str) -> None:
    clock = [NOW_MS]

    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_key(books, 0)
        clock[0] += DAY_MS
        await open_key(books, 1, clock[0])
        with pytest.raises(Unauthenticated):
            await books.key("secret-0")

    play(redis_url, scenario, terms=replace(TERMS, max_unfunded_keys=1), now_ms=lambda: clock[0])


def test_a_machine_enrols_so_many_nodes_and_takes_no_place_of_anothers(redis_url: str) -> None:
    async def scenario(books: Books, served: ServedBooks) -> None:
        async def enrol(node: str, owner: str, machine: str = "thief") -> None:
            await books.enrol_node(node, owner, key_digest=machine, name=node, work_bytes_per_s=0)

        # A thief may name the address of any lender.
        await enrol("a", OWNERS[0])
        await enrol("b", OWNERS[0])
        await enrol("b", OWNERS[1])
        with pytest.raises(Forbidden, match=r"2 nodes.*limits\.max_nodes") as full:
            await enrol("c", OWNERS[1])
        assert full.value.code == "too_many_nodes"
        await enrol("c", OWNERS[0], "lender")
        await (await served.bookkeeper.ledger()).apply(moves.remove_node("a"))
        await enrol("d", OWNERS[0])

    play(redis_url, scenario, terms=replace(TERMS, max_nodes=2))


def test_a_key_without_a_limit_of_its_own_spends_so_much_in_a_day(redis_url: str) -> None:
    clock = [NOW_MS // DAY_MS * DAY_MS]

    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books, 2_000, now_ms=clock[0])
        assert [await reserve(books, f"job-{number}") for number in range(2)] == [112, 112]
        with pytest.raises(
            InsufficientBalance, match=r"this may take .* HYPE; 0\.00000076 of the 0\.000003 HYPE .* are left"
        ) as refused:
            await reserve(books, "job-2")
        assert refused.value.code == "day_limit_reached"
        # Of 112 lamports 80 were charged; what is given back may be spent.
        await settle(books, "job-0")
        assert (await books.keys(ADDRESS))[0].today_lamports == 192
        await reserve(books, "job-3", max_tokens=9)
        with pytest.raises(InsufficientBalance):
            await reserve(books, "job-4")
        clock[0] += DAY_MS
        await reserve(books, "job-5")
        assert (await books.keys(ADDRESS))[0].today_lamports == 112

    play(redis_url, scenario, terms=replace(TERMS, key_day_lamports=300), now_ms=lambda: clock[0])


def test_reservations_at_the_same_moment_stay_within_the_day(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books, 2_000)
        asked = (reserve(books, f"job-{number}") for number in range(9))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert answers.count(112) == 2

    play(redis_url, scenario, terms=replace(TERMS, key_day_lamports=300))


def test_a_key_with_a_limit_of_its_own_has_none_of_a_day(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books, 2_000, spend_limit_lamports=1_000)
        assert [await reserve(books, f"job-{number}") for number in range(4)] == [112] * 4

    play(redis_url, scenario, terms=replace(TERMS, key_day_lamports=300))


def test_the_books_know_what_an_address_paid_in_30_days(redis_url: str) -> None:
    clock = [NOW_MS // DAY_MS * DAY_MS]

    async def scenario(books: Books, served: ServedBooks) -> None:
        await open_account(books, 2_000, now_ms=clock[0])
        for number in range(2):
            await reserve(books, f"job-{number}")
            await settle(books, f"job-{number}")
            assert await books.paid(ADDRESS) == 80 * (number + 1)
            clock[0] += 20 * DAY_MS
        assert await books.paid(ADDRESS) == 80
        await reserve(books, "job-3")
        kept = (await served.bookkeeper.ledger()).state.by_day
        days = {int(row.partition("/")[0]) for row in kept}
        assert len(days) == 2, "older days are forgotten"

    play(redis_url, scenario, now_ms=lambda: clock[0])
