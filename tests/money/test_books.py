"""The door to money: what other rooms can do with the books, over a real Redis."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from eth_account import Account

from azu.auth.signatures import MAX_WITHDRAWAL_LIFE_MS, Withdrawal, sign_claim, sign_withdrawal
from azu.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    InsufficientBalance,
    InvalidRequest,
    LedgerError,
    NotFound,
)
from azu.money.books import Books, Totals, UserBalance, WorkerEarnings
from azu.money.treasury.deposits import CreditState, DepositStatus
from azu.money.treasury.request_reply import DepositRequests, ReceiptRequests
from azu.money.treasury.withdrawals import LEAST_LAMPORTS, WithdrawalState, WithdrawalStatus
from azu.redis_client import connect_redis
from tests.builders import ALICE, OWNERS, api_key, receipt
from tests.money.serving import TESTER, serving

PLATFORM = "0x" + "99" * 20
NOW_MS = 1_000
TX_HASH = "0x" + "12" * 32
USER = Account.from_key("0x" + "05" * 32)


def play(url: str, scenario: Callable[[Books], Awaitable[None]]) -> None:
    async def run() -> None:
        async with serving(url, PLATFORM) as served:
            redis = connect_redis(url)
            books = Books(served.access.url(TESTER), redis)
            await scenario(books)
            await books.close()
            await redis.aclose()

    asyncio.run(run())


async def reserve(books: Books, job_id: str = "job-1", lamports: int = 112, **key: object) -> None:
    await books.reserve(api_key(**key), job_id, lamports, now_ms=NOW_MS, expires_at_ms=NOW_MS + 60_000)


def test_a_job_is_reserved_settled_and_shared_out_as_its_receipt_says(redis_url: str) -> None:
    async def scenario(books: Books) -> None:
        await books.credit(TX_HASH, ALICE, 1_000)
        await reserve(books)
        assert await books.balance(ALICE) == UserBalance(888, 112, 0)

        for _ in range(2):
            await books.settle(receipt())

        assert await books.balance(ALICE) == UserBalance(920, 0, 0)
        assert await books.earnings(OWNERS[0]) == WorkerEarnings(40, 0, 0, claimed=False)
        held = {"user_available": 920, "user_reserved": 0, "worker_earned": 64}
        assert await books.totals() == Totals(80, 64, 0, held, sum_lamports=0)
        assert (await books.audit()).agrees

    play(redis_url, scenario)


def test_a_receipt_without_a_charge_releases_the_whole_reservation(redis_url: str) -> None:
    async def scenario(books: Books) -> None:
        await books.credit(TX_HASH, ALICE, 1_000)
        await reserve(books)

        free = receipt(
            charged_lamports=0, platform_lamports=0, worker_lamports={}, transfer_id="release:job-1"
        )
        await books.settle(free)

        assert await books.balance(ALICE) == UserBalance(1_000, 0, 0)

    play(redis_url, scenario)


@pytest.mark.parametrize(
    "wrong", [{"charged_lamports": 113, "platform_lamports": 49}, {"platform_lamports": 17}]
)
def test_a_receipt_that_does_not_fit_the_reservation_changes_nothing(
    redis_url: str, wrong: dict[str, int]
) -> None:
    async def scenario(books: Books) -> None:
        await books.credit(TX_HASH, ALICE, 1_000)
        await reserve(books)
        with pytest.raises(LedgerError):
            await books.settle(receipt(**wrong))
        assert await books.balance(ALICE) == UserBalance(888, 112, 0)

    play(redis_url, scenario)


def test_a_deposit_is_credited_once_for_each_hash(redis_url: str) -> None:
    async def scenario(books: Books) -> None:
        for _ in range(2):
            await books.credit(TX_HASH, ALICE, 70)
        assert await books.balance(ALICE) == UserBalance(70, 0, 0)

    play(redis_url, scenario)


def test_neither_the_account_nor_the_limit_of_a_key_is_exceeded(redis_url: str) -> None:
    async def scenario(books: Books) -> None:
        await books.credit(TX_HASH, ALICE, 200)
        limited = api_key(key_id="key-2", spend_limit_lamports=150)
        await reserve(books, key_id="key-2", spend_limit_lamports=150)
        assert await books.spent(limited, NOW_MS) == 112
        with pytest.raises(InsufficientBalance) as refused:
            await reserve(books, "job-2", 80, key_id="key-2", spend_limit_lamports=150)
        assert refused.value.code == "spend_limit_reached"
        with pytest.raises(InsufficientBalance) as refused:
            await reserve(books, "job-3", 89)
        assert refused.value.code == "insufficient_balance"

        await books.settle(receipt())

        assert await books.spent(limited, NOW_MS) == 80
        assert await books.balance(ALICE) == UserBalance(120, 0, 0)

    play(redis_url, scenario)


def test_earnings_are_claimed_by_the_address_itself(redis_url: str) -> None:
    async def scenario(books: Books) -> None:
        address = USER.address.lower()
        with pytest.raises(Forbidden):
            await books.claim_earnings(address, sign_claim(Account.create(), PLATFORM))
        assert not (await books.earnings(address)).claimed
        await books.claim_earnings(address, sign_claim(USER, PLATFORM))
        assert (await books.earnings(address)).claimed

    play(redis_url, scenario)


def withdrawal(lamports: int = LEAST_LAMPORTS, nonce: int = 1, life_ms: int = 60_000) -> Withdrawal:
    return Withdrawal(
        address=USER.address.lower(), lamports=lamports, nonce=nonce, expires_at_ms=NOW_MS + life_ms
    )


async def withdraw(books: Books, asked: Withdrawal, platform: str = PLATFORM) -> WithdrawalStatus:
    return await books.withdraw(asked, sign_withdrawal(USER, asked, platform), NOW_MS)


def test_a_withdrawal_waits_for_the_treasury_once(redis_url: str) -> None:
    async def scenario(books: Books) -> None:
        await books.credit(TX_HASH, USER.address.lower(), 2 * LEAST_LAMPORTS)
        waiting = WithdrawalStatus(WithdrawalState.WAITING)
        for _ in range(2):
            assert await withdraw(books, withdrawal()) == waiting
        assert await books.withdrawal(USER.address.lower(), 1) == waiting
        with pytest.raises(Conflict):
            await withdraw(books, withdrawal(nonce=2))
        with pytest.raises(NotFound):
            await books.withdrawal(USER.address.lower(), 2)

    play(redis_url, scenario)


@pytest.mark.parametrize(
    ("asked", "platform", "error"),
    [
        (withdrawal(LEAST_LAMPORTS - 1), PLATFORM, InvalidRequest),
        (withdrawal(), "0x" + "98" * 20, Forbidden),
        (withdrawal(life_ms=0), PLATFORM, InvalidRequest),
        (withdrawal(life_ms=MAX_WITHDRAWAL_LIFE_MS + 1), PLATFORM, InvalidRequest),
        (withdrawal(LEAST_LAMPORTS + 1), PLATFORM, InsufficientBalance),
    ],
)
def test_a_withdrawal_that_is_not_good_is_refused_at_once(
    redis_url: str, asked: Withdrawal, platform: str, error: type[Exception]
) -> None:
    async def scenario(books: Books) -> None:
        await books.credit(TX_HASH, USER.address.lower(), LEAST_LAMPORTS)
        with pytest.raises(error):
            await withdraw(books, asked, platform)
        with pytest.raises(NotFound):
            await books.withdrawal(asked.address, asked.nonce)

    play(redis_url, scenario)


def test_the_treasurys_answers_reach_the_caller(redis_url: str) -> None:
    async def scenario(books: Books) -> None:
        redis = connect_redis(redis_url)
        pending = DepositStatus(CreditState.PENDING, ALICE, 70)

        async def check(_: str) -> DepositStatus:
            return pending

        async def sign(_: str) -> str:
            return "0x01"

        with pytest.raises(DeadlineExceeded):
            await books.deposit(TX_HASH, ALICE, 0.0)
        assert await books.receipt_signature("job-1", 0.0) is None
        await DepositRequests(redis).serve(check, 8)
        await ReceiptRequests(redis).serve(sign, 8)
        await redis.aclose()

        assert await books.deposit(TX_HASH, ALICE, 0.0) == DepositStatus(CreditState.PENDING, ALICE, 0)
        with pytest.raises(Forbidden):
            await books.deposit(TX_HASH, OWNERS[0], 0.0)
        assert await books.receipt_signature("job-1", 0.0) == "0x01"
        assert await books.receipt_signature("job-2", 0.0) is None

    play(redis_url, scenario)


def test_an_audit_compares_the_wallet_on_request(redis_url: str) -> None:
    async def scenario(books: Books) -> None:
        await books.credit(TX_HASH, ALICE, 70)
        assert (await books.audit(70)).agrees
        assert not (await books.audit(69)).agrees

    play(redis_url, scenario)
