"""The door to money: what each caller can do with the books over their wire, over a real Redis."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from eth_account import Account

from azu.auth.key_records import CHALLENGE_TTL_S
from azu.auth.signatures import (
    MAX_WITHDRAWAL_LIFE_MS,
    AcceptLoss,
    Withdrawal,
    sealed,
    sign_certificate,
    sign_claim,
    sign_command,
    sign_dispute,
    sign_withdrawal,
    verify_receipt,
)
from azu.clock import wall_clock_ms
from azu.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    InsufficientBalance,
    InternalError,
    InvalidRequest,
    JournalFault,
    LedgerError,
    NotFound,
    RateLimited,
    TransferConflict,
    Unauthenticated,
)
from azu.money import bookkeeping, books_view
from azu.money.books import Books, JobDispute, Totals, UserBalance, WorkerEarnings
from azu.money.books_process import ALLOWED
from azu.money.charging import UNSHOWN
from azu.money.ledger.journal import RedisJournal
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.seals import Seals
from azu.money.ledger.transfers import Deposit, LossNoted, Settle
from azu.money.receipts import ReceiptKey
from azu.money.signer.calls import SignerCalls
from azu.money.treasury.request_reply import CreditState, DepositRequests, DepositStatus
from azu.money.treasury.withdrawals import LEAST_LAMPORTS, WithdrawalState, WithdrawalStatus
from azu.protocol.job import FinishReason, JobEnding, JobOutcome, JobState, Placement
from azu.redis_client import connect_redis
from tests.builders import ALICE, OWNERS
from tests.money.accounts import BEARER, USER, fund, signed_key
from tests.money.serving import PLATFORM, TERMS, TESTER, ServedBooks, serving

ADDRESS = USER.address.lower()
ADMIN = Account.from_key("0x" + "ad" * 32)
TX_HASH = "0x" + "12" * 32
DONE = JobEnding(JobState.DONE, FinishReason.STOP)
WORK = {0: {"a": 1}, 1: {"a": 1}, 2: {"b": 1}, 3: {"a": 1, "b": 3}}


def play(url: str, scenario: Callable[[Books, ServedBooks], Awaitable[None]], **given: object) -> None:
    async def run() -> None:
        async with serving(url, **given) as served:
            redis = connect_redis(url)
            books = Books(served.access.url(TESTER), redis)
            await scenario(books, served)
            await books.close()
            await redis.aclose()

    asyncio.run(run())


async def open_account(books: Books, lamports: int = 1_000, **key: object) -> None:
    await fund(books, lamports)
    await books.open_key(signed_key(**key))
    for node, owner in (("a", OWNERS[0]), ("b", OWNERS[1])):
        await books.enrol_node(node, owner, key_digest="k", name=node, work_bytes_per_s=0)


async def reserve(books: Books, job_id: str = "job-1", *, max_tokens: int = 10, **given: object) -> int:
    """Reserve for a job of 4 prompt tokens over 4 layers: 112 lamports."""
    facts: dict[str, object] = {"model_id": "test/model", "revision": "r1", "num_layers": 4}
    return await books.reserve(
        str(given.get("bearer", BEARER)), job_id, **facts, prompt_tokens=4, max_tokens=max_tokens
    )


async def settle(books: Books, job_id: str = "job-1", tokens: int = 6, **given: object) -> JobOutcome:
    facts: dict[str, object] = {"work": WORK, "ending": DONE} | given
    return await books.settle(job_id, prompt_tokens=4 if tokens else 0, completion_tokens=tokens, **facts)


def test_the_books_fix_the_price_charge_by_tokens_and_share_out_by_work(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        assert await books.price() == 2
        assert [await reserve(books) for _ in range(2)] == [112, 112]
        assert await books.balance(ADDRESS) == UserBalance(888, 112, 0)
        assert await books.ended("job-1") is None

        placed = replace(DONE, topology=(Placement("ada", "layer:0", (0, 4), {1: (2, 3)}),))
        outcomes = [await settle(books, ending=placed), await settle(books, tokens=10)]

        assert outcomes[0] == outcomes[1] == await books.ended("job-1"), "the first end is the end"
        receipt = outcomes[0].receipt
        assert (receipt.charged_lamports, receipt.released_lamports, receipt.platform_lamports) == (
            80,
            32,
            16,
        )
        assert receipt.worker_lamports == {OWNERS[0]: 36, OWNERS[1]: 28}
        assert (receipt.prompt_tokens, receipt.completion_tokens) == (4, 6)
        assert receipt.topology == placed.topology
        assert await books.balance(ADDRESS) == UserBalance(920, 0, 0)
        assert await books.earnings(OWNERS[0]) == WorkerEarnings(36, 0, 0, claimed=False)
        held = {"user_available": 920, "worker_earned": 64}
        totals = await books.totals()
        assert totals == Totals(80, 64, 0, held, sum_lamports=0)
        assert (await books.audit()).agrees

    play(redis_url, scenario)


def test_a_job_keeps_the_price_at_which_it_was_reserved(redis_url: str) -> None:
    async def scenario(books: Books, served: ServedBooks) -> None:
        await open_account(books)
        await reserve(books)
        await served.stop()
        served.terms = replace(TERMS, lamports_per_token_layer=5, platform_percent=50)
        await served.start()

        assert await reserve(books) == 112
        outcome = await settle(books)

        assert (outcome.receipt.charged_lamports, outcome.receipt.platform_lamports) == (80, 16)
        assert await reserve(books, "job-2") == 280

    play(redis_url, scenario)


def test_no_more_is_charged_than_was_reserved_whatever_the_scheduler_counts(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        await reserve(books)
        outcome = await books.settle(
            "job-1", prompt_tokens=10**6, completion_tokens=10**6, work=WORK, ending=DONE
        )
        assert outcome.receipt.charged_lamports == 112
        with pytest.raises(LedgerError) as unknown:
            await settle(books, "job-2")
        assert unknown.value.code == "unknown_hold"

    play(redis_url, scenario)


def test_what_a_job_paid_out_is_held_when_its_payer_disputes_it(redis_url: str) -> None:
    now_ms = wall_clock_ms()
    clock = [now_ms]

    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        other = Account.create()
        await reserve(books)
        signature = sign_dispute(USER, "job-1", PLATFORM)
        with pytest.raises(Conflict) as refused:
            await books.dispute(ADDRESS, "job-1", signature)
        assert refused.value.code == "job_not_finished"
        await settle(books)
        for address, job_id in ((ADDRESS, "job-2"), (other.address.lower(), "job-1")):
            with pytest.raises(NotFound):
                await books.dispute(address, job_id, sign_dispute(other, job_id, PLATFORM))
        for wrong in (
            sign_dispute(other, "job-1", PLATFORM),
            sign_dispute(USER, "job-2", PLATFORM),
            sign_dispute(USER, "job-1", "0x" + "98" * 20),
            "0x",
        ):
            with pytest.raises(Forbidden):
                await books.dispute(ADDRESS, "job-1", wrong)
        assert (await books.earnings(OWNERS[0])).earned_lamports == 36

        held = await books.dispute(ADDRESS, "job-1", signature)

        assert held == JobDispute("job-1", ADDRESS, 80)
        assert (await books.earnings(OWNERS[0])).earned_lamports == 0
        assert (await books.totals()).held_lamports["user_available"] == 920
        await reserve(books, "job-2")
        await settle(books, "job-2")
        clock[0] += 60_000
        assert await books.dispute(ADDRESS, "job-1", signature) == held
        with pytest.raises(Conflict) as refused:
            await books.dispute(ADDRESS, "job-2", sign_dispute(USER, "job-2", PLATFORM))
        assert refused.value.code == "matured"
        assert (await books.audit()).agrees

    terms = replace(TERMS, maturity_ms=60_000)
    play(redis_url, scenario, terms=terms, now_ms=lambda: clock[0])


def test_a_job_without_tokens_costs_nothing(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        await reserve(books)
        error = {"message": "lost", "type": "server_error", "param": None, "code": "worker_lost"}
        failed = JobEnding(JobState.FAILED, FinishReason.ERROR, error)
        outcome = await settle(books, tokens=0, ending=failed)
        assert (outcome.receipt.charged_lamports, outcome.receipt.released_lamports) == (0, 112)
        assert (outcome.state, outcome.error) == (JobState.FAILED, error)
        assert await books.balance(ADDRESS) == UserBalance(1_000, 0, 0)

    play(redis_url, scenario)


def test_the_shares_of_nodes_that_are_not_enrolled_are_held_until_they_are(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        await reserve(books)
        # The first layer's work is unknown, and the node "c" is not enrolled.
        outcome = await settle(books, work={1: {"c": 1}, 2: {"a": 1}, 3: {"a": 1}})
        assert outcome.receipt.worker_lamports == {OWNERS[0]: 32}
        assert outcome.receipt.held_lamports == 32
        assert (await books.totals()).held_lamports["held"] == 32

        await books.enrol_node("c", OWNERS[2], key_digest="k", name="c", work_bytes_per_s=0)
        assert (await books.earnings(OWNERS[2])).earned_lamports == 16
        with pytest.raises((Conflict, LedgerError)):
            await books.enrol_node("c", OWNERS[3], key_digest="other", name="c", work_bytes_per_s=0)
        assert (await books.audit()).agrees

    play(redis_url, scenario)


def test_no_one_enrols_as_the_node_whose_work_was_not_shown(redis_url: str) -> None:
    async def scenario(books: Books, served: ServedBooks) -> None:
        await open_account(books)
        await reserve(books)
        assert (await settle(books, work={})).receipt.held_lamports == 64

        with pytest.raises(Forbidden):
            await books.enrol_node(UNSHOWN, OWNERS[2], key_digest="k", name="m", work_bytes_per_s=0)
        assert (await books.earnings(OWNERS[2])).earned_lamports == 0
        assert (await books.totals()).held_lamports["held"] == 64

    play(redis_url, scenario)


@pytest.mark.parametrize(
    "work",
    [
        pytest.param({0: {f"n{number}": 1 for number in range(1001)}}, id="nodes"),
        pytest.param({0: {f"{number:0200}": 1 for number in range(100)}}, id="bytes"),
        pytest.param({layer: {f"n{number}": 1 for number in range(990)} for layer in range(6)}, id="parts"),
    ],
)
def test_work_of_more_than_a_job_can_have_is_held_and_makes_no_long_entry(
    redis_url: str, work: dict[int, dict[str, int]]
) -> None:
    async def scenario(books: Books, served: ServedBooks) -> None:
        await open_account(books, 100_000)
        tokens = {"num_layers": 6, "prompt_tokens": 1, "max_tokens": 6_000}
        await books.reserve(BEARER, "job-1", model_id="m", revision="r", **tokens)
        outcome = await settle(books, tokens=6_000, work=work)

        charged = outcome.receipt.charged_lamports
        assert charged == 6_001 * 6 * 2
        assert outcome.receipt.held_lamports == charged - outcome.receipt.platform_lamports
        held = (await books.totals()).held_lamports["held"]
        assert held == outcome.receipt.held_lamports
        settled = await (await served.bookkeeper.ledger()).result("settle:job-1")
        assert settled is not None
        assert isinstance(settled.entry.transfer, Settle)
        assert (settled.entry.transfer.by_node, list(settled.entry.transfer.held)) == ({}, [UNSHOWN])

    play(redis_url, scenario)


def test_nodes_that_get_no_lamport_are_not_named(redis_url: str) -> None:
    async def scenario(books: Books, served: ServedBooks) -> None:
        await open_account(books)
        await reserve(books)
        await settle(books, work={layer: {"a": 10**9, "b": 1, "c": 1} for layer in range(4)})
        settled = await (await served.bookkeeper.ledger()).result("settle:job-1")
        assert settled is not None
        assert isinstance(settled.entry.transfer, Settle)
        assert settled.entry.transfer.by_node == {"a": 64}
        assert settled.entry.transfer.shares == {OWNERS[0]: 64}
        assert settled.entry.transfer.held == {}

    play(redis_url, scenario)


def test_an_error_of_any_length_is_cut(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        await reserve(books)
        long = {secrets.token_hex(20): secrets.token_hex(20) for _ in range(400)}
        error = {"message": "\0" * 10_000, "type": "server_error", "param": None, "code": "x"} | long
        outcome = await settle(books, ending=JobEnding(JobState.FAILED, FinishReason.ERROR, error))
        assert outcome.error == {"message": "\0" * 200, "type": "server_error", "param": None, "code": "x"}
        assert await books.ended("job-1") == outcome

    play(redis_url, scenario)


def test_work_of_layers_that_a_job_does_not_have_is_not_looked_at(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        await reserve(books)
        work = {layer: {"a": 1} for layer in range(4)} | {layer: {"b": 1} for layer in range(4, 6_000)}
        assert (await settle(books, work=work)).receipt.worker_lamports == {OWNERS[0]: 64}

    play(redis_url, scenario)


@pytest.mark.parametrize(
    "job_id", ["job", "job-", "j1", "fetch-1", "job-/1", f"job-{'1' * 61}", ADDRESS, signed_key().key_id]
)
def test_a_job_has_no_name_of_a_key_or_an_address(redis_url: str, job_id: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        with pytest.raises(InvalidRequest):
            await reserve(books, job_id)
        assert (await books.balance(ADDRESS)).reserved_lamports == 0

    play(redis_url, scenario)


def test_a_reservation_has_layers_and_tokens_and_an_address_has_so_many(redis_url: str) -> None:
    clock = [wall_clock_ms()]

    async def scenario(books: Books, served: ServedBooks) -> None:
        await open_account(books, 10_000)
        facts = {"model_id": "m", "revision": "r"}
        for nothing in ({"num_layers": 0, "max_tokens": 1}, {"num_layers": 1, "max_tokens": 0}):
            with pytest.raises(InvalidRequest):
                await books.reserve(BEARER, "job-0", **facts, **nothing, prompt_tokens=0)
        for number in range(3):
            await reserve(books, f"job-{number}")
        for refused in (
            reserve(books, "job-3"),
            books.reserve_fetch(BEARER, "fetch-1", model_id="m", num_bytes=1),
        ):
            with pytest.raises(RateLimited):
                await refused
        assert await reserve(books, "job-0") == 112, "a repeated call"
        await settle(books, "job-0")
        await reserve(books, "job-3")

    terms = replace(TERMS, max_reservations=3, fetch_lamports_per_gib=1)
    play(redis_url, scenario, terms=terms, now_ms=lambda: clock[0])


def test_a_thousand_overdue_jobs_are_named_at_once(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [wall_clock_ms()]
    monkeypatch.setattr(bookkeeping, "_OVERDUE_AT_ONCE", 2)

    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        for number in range(3):
            await reserve(books, f"job-{number}")
            clock[0] += 1
        clock[0] += TERMS.reservation_ttl_ms
        assert await books.overdue() == ("job-0", "job-1")

    play(redis_url, scenario, now_ms=lambda: clock[0])


def test_other_terms_take_no_pay_from_jobs_that_run(redis_url: str) -> None:
    clock = [wall_clock_ms()]

    async def scenario(books: Books, served: ServedBooks) -> None:
        await open_account(books)
        await books.enrol_node("a", OWNERS[0], key_digest="k", name="a", work_bytes_per_s=1_000)
        await reserve(books)
        clock[0] += 4_000
        await served.stop()
        served.terms = replace(TERMS, reservation_ttl_ms=TERMS.reservation_ttl_ms // 2)
        await served.start()
        outcome = await settle(books, work={layer: {"a": 4_000} for layer in range(4)})
        assert outcome.receipt.worker_lamports == {OWNERS[0]: 64}

    play(redis_url, scenario, now_ms=lambda: clock[0])


def test_what_a_node_says_beyond_its_speed_is_held(redis_url: str) -> None:
    now_ms = wall_clock_ms()
    clock = [now_ms]

    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        await books.enrol_node("a", OWNERS[0], key_digest="k", name="a", work_bytes_per_s=1_000)
        # Four times its speed is believed: 8,000 bytes in two seconds, of which it says 16,000.
        many = {layer: {"a": 4_000} for layer in range(4)} | {9: {"a": -8_000}}
        for job_id, took_ms, paid in (("job-1", 2_000, 32), ("job-2", 4_000, 64), ("job-3", 0, 16)):
            await reserve(books, job_id)
            clock[0] += took_ms
            outcome = await settle(books, job_id, work=many)
            assert outcome.receipt.worker_lamports == {OWNERS[0]: paid}
            assert outcome.receipt.held_lamports == 64 - paid
        # A node that enrols once more does not get it.
        await books.enrol_node("a", OWNERS[0], key_digest="k", name="a", work_bytes_per_s=2_000)
        assert (await books.earnings(OWNERS[0])).earned_lamports == 32 + 64 + 16
        # Nor does one gain by a speed that no device has.
        await books.enrol_node("a", OWNERS[0], key_digest="k", name="a", work_bytes_per_s=2**62)
        await reserve(books, "job-4")
        outcome = await settle(books, "job-4", work={layer: {"a": 10**16} for layer in range(4)})
        assert outcome.receipt.worker_lamports == {OWNERS[0]: 32}
        assert (await books.audit()).agrees

    play(redis_url, scenario, now_ms=lambda: clock[0])


def test_work_of_other_nodes_is_paid_where_the_owner_of_a_cluster_says(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        await reserve(books)
        outcome = await settle(books, work={key: {"c": 1} for key in range(4)})
        assert outcome.receipt.worker_lamports == {OWNERS[5]: 64}

    play(redis_url, scenario, terms=replace(TERMS, others_payout=OWNERS[5]))


def test_a_topology_that_is_too_long_for_an_entry_is_left_out(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        for job_id, experts in (("job-1", 128), ("job-2", 20_000)):
            await reserve(books, job_id)
            long = Placement("ada", "expert:0", (0, 0), {layer: tuple(range(experts)) for layer in range(8)})
            outcome = await settle(books, job_id, ending=replace(DONE, topology=(long,)))
            assert outcome.receipt.topology == ((long,) if job_id == "job-1" else ())
            assert await books.ended(job_id) == outcome

    play(redis_url, scenario)


def test_a_reservation_expires_once_it_is_overdue_and_not_before(redis_url: str) -> None:
    now_ms = wall_clock_ms()
    clock = [now_ms]

    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        await reserve(books)
        assert await books.overdue() == ()
        with pytest.raises(Conflict):
            await books.expire("job-1")
        clock[0] += TERMS.reservation_ttl_ms
        assert await books.overdue() == ("job-1",)
        for _ in range(2):
            await books.expire("job-1")
        assert await books.balance(ADDRESS) == UserBalance(1_000, 0, 0)
        outcome = await settle(books)
        assert (outcome.state, outcome.receipt.charged_lamports) == (JobState.FAILED, 0)
        assert outcome.error
        assert outcome.error["code"] == "job_lost"

    play(redis_url, scenario, now_ms=lambda: clock[0])


def test_what_was_reserved_for_a_job_that_never_ran_is_given_back(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        await reserve(books)
        for _ in range(2):
            await books.give_back("job-1")
        assert await books.balance(ADDRESS) == UserBalance(1_000, 0, 0)
        await books.give_back("job-2")

    play(redis_url, scenario)


def test_what_is_just_being_reserved_is_given_back_too(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        store = connect_redis(redis_url)
        await store.client_pause(300, all=False)
        reserving = asyncio.create_task(reserve(books))
        await asyncio.sleep(0.1)
        await books.give_back("job-1")

        assert await reserving == 112
        assert await books.balance(ADDRESS) == UserBalance(1_000, 0, 0)
        await store.aclose()

    play(redis_url, scenario)


def test_neither_the_account_nor_the_limit_of_a_key_is_exceeded(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books, 200)
        await books.open_key(signed_key(bearer="limited", spend_limit_lamports=150))
        await reserve(books, bearer="limited")
        limited = (await books.keys(ADDRESS))[1]
        assert (limited.key.spend_limit_lamports, limited.spent_lamports) == (150, 112)
        with pytest.raises(InsufficientBalance) as refused:
            await reserve(books, "job-2", max_tokens=5, bearer="limited")
        assert refused.value.code == "spend_limit_reached"
        with pytest.raises(InsufficientBalance) as refused:
            await reserve(books, "job-3")
        assert refused.value.code == "insufficient_balance"

        await settle(books)

        assert (await books.keys(ADDRESS))[1].spent_lamports == 80
        assert await books.balance(ADDRESS) == UserBalance(120, 0, 0)

    play(redis_url, scenario)


def test_of_many_reservations_at_once_the_balance_decides_how_many_are_made(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books, 10 * 112 + 5)
        asked = (reserve(books, f"job-{number}") for number in range(300))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(answer == 112 for answer in answers) == 10
        assert sum(isinstance(answer, InsufficientBalance) for answer in answers) == 290
        assert await books.balance(ADDRESS) == UserBalance(5, 1_120, 0)

    play(redis_url, scenario)


def test_a_job_is_reserved_once_and_only_as_it_was_asked_first(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        await reserve(books)
        with pytest.raises(TransferConflict):
            await reserve(books, max_tokens=9)
        assert await books.balance(ADDRESS) == UserBalance(888, 112, 0)

    play(redis_url, scenario)


def test_a_key_is_opened_by_its_owners_signature_and_is_good_until_its_end(redis_url: str) -> None:
    now_ms = wall_clock_ms()
    clock = [now_ms]

    async def scenario(books: Books, _: ServedBooks) -> None:
        key = signed_key(expires_at_ms=now_ms + 1_000)
        for wrong in (
            replace(key, spend_limit_lamports=7),
            replace(key, address=ALICE),
            replace(key, signature="0x"),
            signed_key(platform="0x" + "98" * 20),
            signed_key(now_ms=now_ms - CHALLENGE_TTL_S * 1000),
        ):
            with pytest.raises(Unauthenticated):
                await books.open_key(wrong)
        with pytest.raises(Unauthenticated):
            await books.key(BEARER)
        for _ in range(2):
            await books.open_key(key)
        assert await books.key(BEARER) == replace(key, text="", signature="")
        with pytest.raises(Conflict) as known:
            await books.open_key(signed_key(Account.create()))
        assert known.value.code == "key_exists"

        await fund(books, 1_000)
        clock[0] += 1_000
        for refused in (books.key(BEARER), reserve(books)):
            with pytest.raises(Unauthenticated):
                await refused

    play(redis_url, scenario, now_ms=lambda: clock[0])


def test_a_key_is_revoked_by_its_owner_for_ever(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        key = signed_key()
        await books.open_key(key)
        await books.open_key(signed_key(bearer="limited", spend_limit_lamports=7))
        await books.open_key(signed_key(Account.create(), "of another"))
        with pytest.raises(Forbidden):
            await books.revoke_key("limited", key.key_id)
        with pytest.raises(NotFound):
            await books.revoke_key("of another", key.key_id)
        await books.revoke_key(BEARER, key.key_id)
        with pytest.raises(Unauthenticated):
            await books.key(BEARER)
        # What was signed before opens nothing again.
        with pytest.raises(Conflict):
            await books.open_key(key)
        assert [one.key.spend_limit_lamports for one in await books.keys(ADDRESS)] == [7]

    play(redis_url, scenario)


def test_an_address_has_so_many_keys_and_those_that_expired_make_room(redis_url: str) -> None:
    now_ms = wall_clock_ms()
    clock = [now_ms]

    async def scenario(books: Books, _: ServedBooks) -> None:
        await books.open_key(signed_key(bearer="one", expires_at_ms=now_ms + 10))
        await books.open_key(signed_key(bearer="two"))
        with pytest.raises(Forbidden) as full:
            await books.open_key(signed_key(bearer="three"))
        assert full.value.code == "too_many_keys"
        clock[0] += 10
        await books.open_key(signed_key(bearer="three"))
        assert len(await books.keys(ADDRESS)) == 2

    play(redis_url, scenario, now_ms=lambda: clock[0], terms=replace(TERMS, max_keys=2))


def test_earnings_are_claimed_by_the_address_itself_and_owed_from_then_on(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        await books.enrol_node("a", ADDRESS, key_digest="k", name="a", work_bytes_per_s=0)
        await reserve(books)
        await settle(books)
        with pytest.raises(Forbidden):
            await books.claim_earnings(ADDRESS, sign_claim(Account.create(), PLATFORM))
        assert not (await books.earnings(ADDRESS)).claimed
        assert await books.owed() == {}
        for _ in range(2):
            await books.claim_earnings(ADDRESS, sign_claim(USER, PLATFORM))
        assert (await books.earnings(ADDRESS)).claimed
        assert await books.owed() == {ADDRESS: 36}

    play(redis_url, scenario)


def test_earnings_that_may_still_be_reversed_are_not_owed(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await open_account(books)
        await books.enrol_node("a", ADDRESS, key_digest="k", name="a", work_bytes_per_s=0)
        await reserve(books)
        await settle(books)
        await books.claim_earnings(ADDRESS, sign_claim(USER, PLATFORM))
        assert (await books.earnings(ADDRESS)).earned_lamports == 36
        assert await books.owed() == {}

    play(redis_url, scenario, terms=replace(TERMS, maturity_ms=60_000))


def withdrawal(lamports: int = LEAST_LAMPORTS, nonce: int = 1, life_ms: int = 60_000) -> Withdrawal:
    return Withdrawal(
        address=ADDRESS, lamports=lamports, nonce=nonce, expires_at_ms=wall_clock_ms() + life_ms
    )


async def withdraw(books: Books, asked: Withdrawal, platform: str = PLATFORM) -> WithdrawalStatus:
    return await books.withdraw(asked, sign_withdrawal(USER, asked, platform))


def test_a_withdrawal_waits_for_the_treasury_once(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await fund(books, 2 * LEAST_LAMPORTS)
        waiting, asked = WithdrawalStatus(WithdrawalState.WAITING), withdrawal()
        for _ in range(2):
            assert await withdraw(books, asked) == waiting
        assert await books.withdrawal(ADDRESS, 1) == waiting
        with pytest.raises(Conflict):
            await withdraw(books, withdrawal(nonce=2))
        with pytest.raises(NotFound):
            await books.withdrawal(ADDRESS, 2)

    play(redis_url, scenario)


@pytest.mark.parametrize(
    ("given", "platform", "error"),
    [
        ({"lamports": LEAST_LAMPORTS - 1}, PLATFORM, InvalidRequest),
        ({}, "0x" + "98" * 20, Forbidden),
        ({"life_ms": 0}, PLATFORM, InvalidRequest),
        ({"life_ms": MAX_WITHDRAWAL_LIFE_MS + 60_000}, PLATFORM, InvalidRequest),
        ({"lamports": LEAST_LAMPORTS + 1}, PLATFORM, InsufficientBalance),
    ],
)
def test_a_withdrawal_that_is_not_good_is_refused_at_once(
    redis_url: str, given: dict[str, int], platform: str, error: type[Exception]
) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await fund(books, LEAST_LAMPORTS)
        asked = withdrawal(**given)
        with pytest.raises(error):
            await withdraw(books, asked, platform)
        with pytest.raises(NotFound):
            await books.withdrawal(asked.address, asked.nonce)

    play(redis_url, scenario)


def test_the_treasurys_answers_reach_the_caller(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        redis = connect_redis(redis_url)
        pending = DepositStatus(CreditState.PENDING, ALICE, 70)

        async def check(_: str) -> DepositStatus:
            return pending

        with pytest.raises(DeadlineExceeded):
            await books.deposit(TX_HASH, ALICE, 0.0)
        await DepositRequests(redis).serve(check, 8)
        await redis.aclose()

        assert await books.deposit(TX_HASH, ALICE, 0.0) == DepositStatus(CreditState.PENDING, ALICE, 0)
        with pytest.raises(Forbidden):
            await books.deposit(TX_HASH, OWNERS[0], 0.0)

    play(redis_url, scenario)


def test_an_audit_compares_the_wallet_on_request(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks) -> None:
        await fund(books, 70)
        assert (await books.audit(70)).agrees
        assert not (await books.audit(69)).agrees

    play(redis_url, scenario)


class Certifier(SignerCalls):
    """A signer that certifies."""

    def __init__(self, key: str) -> None:
        self.account = Account.from_key(key)

    async def certify(self, address: str) -> str:
        return sign_certificate(self.account, address)


def test_receipts_are_signed_by_a_key_of_the_books_once_the_platform_has_certified_it(
    redis_url: str, tmp_path: Path
) -> None:
    signer = Certifier("0x" + "09" * 32)
    platform, path = signer.account.address.lower(), tmp_path / "receipt-key.json"
    key = ReceiptKey(path, platform)

    async def scenario(books: Books, served: ServedBooks) -> None:
        await books.open_key(signed_key(platform=platform))
        await fund(books, 1_000)
        await reserve(books)
        assert await books.receipt_signature("job-1") is None, "it has not ended"
        outcome = await settle(books)
        assert await books.receipt_signature("job-1") is None, "the key is not certified"
        with pytest.raises(InternalError, match="another platform"):
            await key.have_certified(Certifier("0x" + "0a" * 32))
        await key.have_certified(signer)

        signature = await books.receipt_signature("job-1")

        assert verify_receipt(sealed(outcome.receipt, platform, signature)) == platform
        # It outlives the process, and the platform is asked once.
        assert path.stat().st_mode & 0o777 == 0o600
        again = ReceiptKey(path, platform)
        await again.have_certified(SignerCalls())
        assert again.sign(outcome.receipt) == signature
        # What the signer finds concerns payouts; a ledger that went back concerns receipts too.
        await books.view(0, 0, ("the account lacks 1 lamports",))
        assert await books.receipt_signature("job-1") == signature
        await (await served.bookkeeper.ledger()).apply(LossNoted(id="loss:1", num_entries=3))
        assert await books.receipt_signature("job-1") is None

    play(redis_url, scenario, platform=platform, receipts=key)


def test_a_view_has_so_many_credits_and_the_next_goes_on(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books_view, "_ENTRIES", 2)

    async def scenario(books: Books, _: ServedBooks) -> None:
        for number in range(5):
            deposit = Deposit(id=f"deposit:{number}", address=ADDRESS, lamports=1, at_ms=wall_clock_ms())
            await books.apply(deposit)
        views = [await books.view(0, 0)]
        while views[-1].credits_until < views[-1].head.number:
            views.append(await books.view(0, views[-1].credits_until))
        assert [[credit.row for credit in view.credits] for view in views] == [["0", "1"], ["2", "3"], ["4"]]

    play(redis_url, scenario)


def test_a_loss_stands_until_the_admin_accepts_it(redis_url: str) -> None:
    async def scenario(books: Books, served: ServedBooks) -> None:
        await fund(books, 70)
        assert await books.loss() == 0
        assert await books.findings() == ()
        core = await served.bookkeeper.ledger()
        await core.apply(LossNoted(id="loss:1", num_entries=3))
        assert await books.loss() == (await books.totals()).lost_writes == 3
        assert await books.findings() == ("the ledger went back by 3 entries",)
        with pytest.raises(JournalFault, match="went back by 3"):
            await books.view(1, 1)
        head = await books.head()
        accepted = AcceptLoss(
            number=head.number, hash=head.hash, nonce=1, expires_at_ms=wall_clock_ms() + 60_000
        )
        await books.command(sign_command(ADMIN, accepted, PLATFORM))
        assert await books.loss() == 0
        assert (await books.view(1, 1)).head.number == head.number + 1

    play(redis_url, scenario, terms=replace(TERMS, admins=(ADMIN.address.lower(),)))


def test_a_journal_that_was_changed_is_said_to_be(redis_url: str) -> None:
    async def scenario(books: Books, served: ServedBooks) -> None:
        await fund(books, 70)
        await served.bookkeeper.verify()
        redis = connect_redis(redis_url)
        rows = await redis.xrange("azu:ledger:journal")
        await redis.delete("azu:ledger:journal")
        for number, fields in rows:
            changed = {**fields, "entry": fields["entry"].replace("70", "71")}
            await redis.xadd("azu:ledger:journal", changed, number)
        await redis.aclose()

        await served.bookkeeper.verify()

        with pytest.raises(JournalFault) as found:
            await books.loss()
        assert found.value.code == "journal_changed"

    play(redis_url, scenario)


def test_an_entry_that_another_process_added_is_said_to_be_there(redis_url: str, tmp_path: Path) -> None:
    async def scenario(books: Books, served: ServedBooks) -> None:
        await fund(books, 70)
        await served.bookkeeper.verify()
        assert await books.loss() == 0
        other = await Ledger.open(RedisJournal.from_url(redis_url), Seals(tmp_path))
        await other.apply(Deposit(id="deposit:0x2", address=ALICE, lamports=7, at_ms=1))
        await other.close()

        # As its loop does, until an operator looks.
        for _ in range(10):
            await served.bookkeeper.verify()

        with pytest.raises(JournalFault, match="another process") as found:
            await books.loss()
        assert found.value.code == "journal_changed"

    play(redis_url, scenario)


CALLS_OF_OTHERS = {
    "ingress": ("settle", "expire", "apply", "owed", "command", "audit"),
    "scheduler": ("reserve", "open_key", "balance", "apply", "command", "withdraw", "enrol_node"),
    "treasury": ("reserve", "settle", "open_key", "command", "enrol_node", "withdraw"),
    "signer": ("apply", "command", "settle", "withdraw"),
    "owner": ("reserve", "settle", "apply", "open_key", "withdraw"),
}


def test_no_caller_makes_the_calls_of_others() -> None:
    assert {caller: [call for call in calls if call in ALLOWED[caller]]
            for caller, calls in CALLS_OF_OTHERS.items()} == {key: [] for key in ALLOWED}  # fmt: skip
