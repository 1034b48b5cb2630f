"""An admin's signed commands: each is carried out once, and only what the rules allow."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.auth.signatures import (
    AcceptLoss,
    AdminCommand,
    ConfirmPayout,
    CoverLoss,
    CreditSuspense,
    DismissDispute,
    PayHeld,
    ReleaseHeld,
    RemoveNode,
    ReverseJob,
    TakeRevenue,
    command_of,
    sign_claim,
    sign_command,
    sign_dispute,
)
from azu.clock import wall_clock_ms
from azu.errors import AzuError, Conflict, Forbidden, InsufficientBalance, LedgerError, NotFound
from azu.money.books import Books, JobDecision, UserBalance
from azu.money.ledger.transfers import LossNoted, Suspended
from azu.money.signer.policy import kind_of
from azu.money.signer.views import PayoutKind
from tests.builders import BOB, OWNERS
from tests.money.accounts import USER, fund
from tests.money.serving import PLATFORM, TERMS, ServedBooks
from tests.money.test_books import ADDRESS, open_account, play, reserve, settle

ADMIN: LocalAccount = Account.from_key("0x" + "0d" * 32)
DAY_MS = 86_400_000
OTHER_ADMIN: LocalAccount = Account.from_key("0x" + "0e" * 32)
ADMINS = tuple(one.address.lower() for one in (ADMIN, OTHER_ADMIN))
GIVEN = replace(TERMS, admins=ADMINS, maturity_ms=DAY_MS)
NOW_MS = wall_clock_ms() - 3_600_000  # far from the machine's clock: a slow run changes nothing
LIFE = {"nonce": 1, "expires_at_ms": NOW_MS + 60_000}


def signed(command: AdminCommand, account: LocalAccount = ADMIN, platform: str = PLATFORM) -> str:
    return sign_command(account, command, platform)


def decide(
    url: str, scenario: Callable[[Books, ServedBooks, list[int]], Awaitable[None]], **given: object
) -> None:
    """Play a scenario in which job-1 ended: 16 lamports of it are the platform's, 36 and 28 of a and b."""
    clock = [NOW_MS]

    async def begun(books: Books, served: ServedBooks) -> None:
        await open_account(books, now_ms=NOW_MS)
        await reserve(books)
        await settle(books, **given)
        await scenario(books, served, clock)
        assert (await books.audit()).agrees

    play(url, begun, terms=GIVEN, now_ms=lambda: clock[0])


async def refused(books: Books, text: str, error: type[AzuError], code: str) -> None:
    """Check that a command is refused, and that not even an entry was written."""
    before = (await books.audit()).entries
    with pytest.raises(error) as raised:
        await books.command(text)
    assert raised.value.code == code
    assert (await books.audit()).entries == before


def test_a_job_is_reversed_once_and_the_same_command_again_changes_nothing(redis_url: str) -> None:
    async def scenario(books: Books, served: ServedBooks, _: list[int]) -> None:
        text = signed(ReverseJob(job_id="job-1", **LIFE))
        await books.command(text)
        assert await books.balance(ADDRESS) == UserBalance(1_000, 0, 0)
        assert (await books.totals()).charged_lamports == 0
        entries = (await books.audit()).entries
        await books.command(text)
        assert (await books.audit()).entries == entries
        for kind in (ReverseJob, DismissDispute):
            again = signed(kind(job_id="job-1", **LIFE | {"nonce": 2}))
            await refused(books, again, Conflict, "nonce_used")

        # The job stays decided where the books begin anew, from what they have sealed away.
        await served.bookkeeper.seal(1)
        await served.stop()
        await served.start()
        await reserve(books, "job-2")
        await settle(books, "job-2")
        await books.command(text)
        await refused(books, again, Conflict, "nonce_used")
        assert await books.decision("job-1") == JobDecision("reversed", 80)
        assert await books.decision("job-2") == JobDecision()
        assert await books.balance(ADDRESS) == UserBalance(920, 0, 0)

    decide(redis_url, scenario)


def test_a_nonce_is_used_once_for_what_may_be_commanded_again(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks, __: list[int]) -> None:
        await books.command(signed(RemoveNode(node_id="a", **LIFE)))
        await refused(books, signed(RemoveNode(node_id="b", **LIFE)), Conflict, "nonce_used")

    decide(redis_url, scenario)


def test_a_job_that_has_matured_is_not_reversed(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks, clock: list[int]) -> None:
        clock[0] += DAY_MS
        late = ReverseJob(job_id="job-1", nonce=1, expires_at_ms=clock[0] + 1)
        await refused(books, signed(late), Conflict, "matured")
        assert await books.balance(ADDRESS) == UserBalance(920, 0, 0)

    decide(redis_url, scenario)


def test_a_command_counts_only_when_an_admin_signed_it_for_this_platform_and_in_time(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks, clock: list[int]) -> None:
        command = ReverseJob(job_id="job-1", **LIFE)
        good = signed(command)
        for text in (
            signed(command, USER),
            signed(command, ADMIN, "0x" + "98" * 20),
            good.replace("job-1", "job-2"),
            good.replace("ReverseJob", "DismissDispute"),
            good.replace('"nonce":1', '"nonce":-1'),
            good.replace('"nonce":1', f'"nonce":{2**256}'),
            good[:-1],
            "",
            "{}",
        ):
            await refused(books, text, Forbidden, "no_admin")
        clock[0] += 60_000
        await refused(books, good, Forbidden, "command_expired")

    decide(redis_url, scenario)


def test_held_money_of_a_node_goes_where_an_admin_says(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks, clock: list[int]) -> None:
        amounts = {"lamports": 30, "nonce": 1}
        paid = PayHeld(node_id="c", address=OWNERS[2], expires_at_ms=NOW_MS + 2 * DAY_MS, **amounts)
        back = ReleaseHeld(node_id="c", address=BOB, expires_at_ms=NOW_MS + 2 * DAY_MS, **amounts)
        await refused(books, signed(paid), Conflict, "not_matured")
        clock[0] += DAY_MS
        await books.command(signed(paid))
        await books.command(signed(back))
        assert (await books.earnings(OWNERS[2])).earned_lamports == 30
        assert await books.balance(BOB) == UserBalance(30, 0, 0)
        # 64 were held.
        await refused(books, signed(replace(paid, nonce=2)), Conflict, "not_matured")

    decide(redis_url, scenario, work={key: {"c": 1} for key in range(4)})


def test_the_work_of_a_node_that_an_admin_removed_is_held(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks, __: list[int]) -> None:
        await books.command(signed(RemoveNode(node_id="a", **LIFE)))
        await reserve(books, "job-2")
        outcome = await settle(books, "job-2")
        assert outcome.receipt.worker_lamports == {OWNERS[1]: 28}
        assert outcome.receipt.held_lamports == 36
        with pytest.raises(Conflict) as raised:
            await books.enrol_node("a", OWNERS[0], key_digest="k", name="a", work_bytes_per_s=0)
        assert raised.value.code == "node_removed"
        other = RemoveNode(node_id="x", **LIFE | {"nonce": 2})
        await refused(books, signed(other), Conflict, "unknown_node")

    decide(redis_url, scenario)


def test_a_row_in_suspense_is_credited_to_whom_an_admin_says(redis_url: str) -> None:
    async def scenario(books: Books, served: ServedBooks, _: list[int]) -> None:
        ledger = await served.bookkeeper.ledger()
        await ledger.apply(Suspended(id="suspended:r1", sender=BOB, lamports=7, row="r1", at_ms=NOW_MS))
        text = signed(CreditSuspense(row="r1", address=BOB, **LIFE))
        for _ in range(2):
            await books.command(text)
        assert await books.balance(BOB) == UserBalance(7, 0, 0)
        again = CreditSuspense(row="r1", address=BOB, **LIFE | {"nonce": 2})
        await refused(books, signed(again), NotFound, "row_not_found")

    decide(redis_url, scenario)


@pytest.mark.parametrize("is_right", [True, False])
def test_an_admin_decides_a_dispute_also_after_the_time_of_maturity(redis_url: str, is_right: bool) -> None:
    async def scenario(books: Books, _: ServedBooks, clock: list[int]) -> None:
        late = {"job_id": "job-1", "nonce": 1, "expires_at_ms": NOW_MS + 2 * DAY_MS}
        dismissal = signed(DismissDispute(**late))
        await refused(books, dismissal, Conflict, "matured")
        await books.dispute(ADDRESS, "job-1", sign_dispute(USER, "job-1", PLATFORM))
        assert await books.decision("job-1") == JobDecision("held", 80)
        clock[0] += DAY_MS
        await books.claim_earnings(ADDRESS, sign_claim(USER, PLATFORM))

        await books.command(signed(ReverseJob(**late)) if is_right else dismissal)

        assert (await books.balance(ADDRESS)).available_lamports == (1_000 if is_right else 920)
        assert (await books.earnings(OWNERS[0])).earned_lamports == (0 if is_right else 36)
        again = DismissDispute(**late | {"nonce": 2})
        await refused(books, signed(again), Conflict, "nonce_used")
        decision = JobDecision("reversed", 80) if is_right else JobDecision("dismissed")
        assert await books.decision("job-1") == decision

    decide(redis_url, scenario)


def test_matured_revenue_becomes_an_open_payout_once(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks, clock: list[int]) -> None:
        asked = TakeRevenue(address=BOB, lamports=16, nonce=1, expires_at_ms=NOW_MS + 2 * DAY_MS)
        await refused(books, signed(asked), Conflict, "not_matured")
        clock[0] += DAY_MS
        await refused(books, signed(replace(asked, lamports=17, nonce=2)), Conflict, "not_matured")
        for _ in range(2):
            await books.command(signed(asked))
        [payout] = await books.open_payouts()
        assert (payout.kind, payout.address, payout.lamports) == (PayoutKind.REVENUE, BOB, 16)
        assert (payout.proof, kind_of(payout.nonce)) == (signed(asked), PayoutKind.REVENUE)
        with pytest.raises(Conflict, match="used before"):
            await books.command(signed(replace(asked, lamports=1)))

    decide(redis_url, scenario)


def test_an_admin_covers_a_loss_from_his_own_account_alone(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks, __: list[int]) -> None:
        own = ADMIN.address.lower()
        covers = CoverLoss(address=own, lamports=70, **LIFE)
        for others in (ADDRESS, OTHER_ADMIN.address.lower()):
            await refused(books, signed(replace(covers, address=others)), Forbidden, "no_admin")
        await refused(books, signed(covers, OTHER_ADMIN), Forbidden, "no_admin")
        await refused(books, signed(covers), InsufficientBalance, "insufficient_balance")
        await fund(books, 100, ADMIN, "0x2")
        charged = (await books.totals()).charged_lamports
        for _ in range(2):
            await books.command(signed(covers))
        assert await books.balance(own) == UserBalance(30, 0, 0)
        assert (await books.totals()).charged_lamports == charged, "it is no charge"

    decide(redis_url, scenario)


def test_a_loss_is_accepted_where_there_is_one(redis_url: str) -> None:
    async def scenario(books: Books, served: ServedBooks, _: list[int]) -> None:
        head = await books.head()
        asked = AcceptLoss(number=head.number, hash=head.hash, **LIFE)
        with pytest.raises(Conflict, match="nothing to accept"):
            await books.command(signed(asked))
        await (await served.bookkeeper.ledger()).apply(LossNoted(id="loss:1", num_entries=3))
        for other in (replace(asked, hash="ab"), replace(asked, number=asked.number + 9)):
            with pytest.raises(Conflict, match="as the command names it"):
                await books.command(signed(other))
        assert await books.loss() == 3
        await books.command(signed(asked))
        assert await books.loss() == 0

    decide(redis_url, scenario)


def test_a_command_that_no_entry_can_keep_is_refused_and_the_books_go_on(redis_url: str) -> None:
    async def scenario(books: Books, _: ServedBooks, __: list[int]) -> None:
        padded = signed(ReverseJob(job_id="job-1", **LIFE)) + " " * 2048
        await refused(books, padded, LedgerError, "ledger_error")
        assert await books.balance(ADDRESS) == UserBalance(920, 0, 0)

    decide(redis_url, scenario)


def test_every_kind_of_command_reads_back_as_it_was_signed() -> None:
    held = {"node_id": "n", "address": BOB, "lamports": 5, **LIFE}
    commands: tuple[AdminCommand, ...] = (
        ReverseJob(job_id="j", **LIFE), DismissDispute(job_id="j", **LIFE), PayHeld(**held),
        ReleaseHeld(**held), RemoveNode(node_id="n", **LIFE), CreditSuspense(row="r", address=BOB, **LIFE),
        TakeRevenue(address=BOB, lamports=5, **LIFE), CoverLoss(address=BOB, lamports=5, **LIFE),
        ConfirmPayout(payout_id="p", **LIFE),
        AcceptLoss(number=1, hash="ab", **LIFE),
    )  # fmt: skip
    for command in commands:
        assert command_of(signed(command), [PLATFORM], [ADMIN.address.lower()]) == command
