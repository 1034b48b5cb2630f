"""The books while the clock of their machine is wrong: a step moves no money, and leaves nothing behind."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from azu.auth.signatures import TakeRevenue, Withdrawal, sign_command, sign_withdrawal
from azu.clock import SteadyClock, wall_clock_ms
from azu.money.books import Books
from azu.money.ledger.transfers import Deposit, PayoutPlanned, UnknownOut
from azu.money.signer.policy import nonce_for
from azu.money.signer.views import PayoutKind
from azu.units import GIB
from tests.builders import BOB, OWNERS
from tests.money.accounts import BEARER, USER
from tests.money.ledger import moves
from tests.money.serving import PLATFORM, TERMS, ServedBooks
from tests.money.test_books import ADDRESS, ADMIN, open_account, play, reserve, settle

DAY_MS = 86_400_000
HOUR_MS = 3_600_000
NOW_MS = wall_clock_ms() - 3_600_000  # far from the machine's clock: a slow run changes nothing
GIVEN = replace(
    TERMS,
    admins=(ADMIN.address.lower(),),
    maturity_ms=DAY_MS,
    reservation_ttl_ms=HOUR_MS,
    fetch_lamports_per_gib=100,
)


class Machine:
    """The clocks of the machine of the books."""

    def __init__(self) -> None:
        self.wall_ms, self.elapsed_ms = NOW_MS, 0
        self.clock = SteadyClock(lambda: self.wall_ms, lambda: self.elapsed_ms)

    def passes(self, ms: int) -> None:
        self.wall_ms += ms
        self.elapsed_ms += ms

    async def restarts(self, served: ServedBooks) -> None:
        """Have the books end and begin again, with what the clock says then."""
        await served.stop()
        self.clock = SteadyClock(lambda: self.wall_ms, lambda: self.elapsed_ms)
        served.hears = self.clock.hears
        await served.start()


def decide(url: str, scenario: Callable[[Books, ServedBooks, Machine], Awaitable[None]]) -> None:
    machine = Machine()

    async def begun(books: Books, served: ServedBooks) -> None:
        await open_account(books, now_ms=NOW_MS, expires_at_ms=NOW_MS + 10 * DAY_MS)
        await scenario(books, served, machine)
        assert (await books.audit()).agrees

    play(url, begun, terms=GIVEN, now_ms=lambda: machine.clock(), hears=machine.clock.hears)


async def owed(books: Books) -> int:
    return (await books.owed()).get(OWNERS[0], 0)


async def claim(served: ServedBooks) -> None:
    ledger = await served.bookkeeper.ledger()
    await ledger.apply(moves.claim(OWNERS[0]))


def test_a_step_of_a_running_machine_has_nothing_mature_expire_or_wait(redis_url: str) -> None:
    async def scenario(books: Books, served: ServedBooks, machine: Machine) -> None:
        await claim(served)
        await reserve(books, "job-1")
        await settle(books, "job-1")
        await reserve(books, "job-2")
        machine.wall_ms += 40 * DAY_MS
        assert await owed(books) == 0
        assert await books.overdue() == ()
        await settle(books, "job-2")
        await reserve(books, "job-3")
        machine.wall_ms -= 40 * DAY_MS
        await settle(books, "job-3")
        machine.passes(DAY_MS)
        await books.enrol_node("c", BOB, key_digest="k", name="c", work_bytes_per_s=0)
        assert await owed(books) == 3 * 36

    decide(redis_url, scenario)


def test_books_that_began_with_a_wrong_clock_go_on_when_they_hear_the_chains_time(redis_url: str) -> None:
    async def scenario(books: Books, served: ServedBooks, machine: Machine) -> None:
        await claim(served)
        machine.wall_ms += 40 * DAY_MS
        await machine.restarts(served)
        # Before the treasury has told the time.
        await books.apply(Deposit(id="deposit:0x7", address=ADDRESS, lamports=7_000, at_ms=NOW_MS))
        await books.hear_time(NOW_MS)

        # The key has not ended, work is paid a day later, and what is lost comes back.
        await reserve(books, "job-1")
        await settle(books, "job-1")
        await reserve(books, "job-2")
        machine.passes(DAY_MS)
        assert await books.overdue() == ("job-2",)
        await books.expire("job-2")
        assert await owed(books) == 36
        # Money is taken out under a nonce of the chain's time, before which nothing is blocked.
        life = {"nonce": 1, "expires_at_ms": NOW_MS + 2 * DAY_MS}
        take = TakeRevenue(address=BOB, lamports=5, **life)
        await books.command(sign_command(ADMIN, take, PLATFORM))
        [payout] = await books.open_payouts()
        assert abs(payout.nonce - NOW_MS - DAY_MS) < HOUR_MS
        nonce = nonce_for(PayoutKind.EARNINGS, OWNERS[0], NOW_MS + DAY_MS)
        await books.apply(
            PayoutPlanned(id="p:planned", payout_id="p", address=OWNERS[0], lamports=36, nonce=nonce)
        )
        asked = Withdrawal(address=ADDRESS, lamports=10**6, nonce=1, expires_at_ms=NOW_MS + 2 * DAY_MS - 1)
        await books.apply(Deposit(id="deposit:0x8", address=ADDRESS, lamports=10**6, at_ms=NOW_MS))
        await books.withdraw(asked, sign_withdrawal(USER, asked, PLATFORM))
        # What leaves unknown is booked, and not taken for a payout of long ago.
        await books.apply(UnknownOut(id="out:1", address=OWNERS[1], lamports=3, nonce=NOW_MS + DAY_MS + 2))
        assert await books.result("out:1") is not None

    decide(redis_url, scenario)


def test_books_that_began_with_a_clock_that_is_behind_have_nothing_mature_or_expire_early(
    redis_url: str,
) -> None:
    async def scenario(books: Books, served: ServedBooks, machine: Machine) -> None:
        await claim(served)
        await reserve(books, "job-1")
        await settle(books, "job-1")
        await reserve(books, "job-2")
        machine.wall_ms -= 2 * DAY_MS
        await machine.restarts(served)
        # Before the treasury has told the time.
        await reserve(books, "job-3")
        await books.hear_time(NOW_MS)
        await reserve(books, "job-4")
        assert (await owed(books), await books.overdue()) == (0, ())
        for job in ("job-2", "job-3", "job-4"):
            await settle(books, job)
        machine.passes(DAY_MS)
        await books.enrol_node("c", BOB, key_digest="k", name="c", work_bytes_per_s=0)
        assert await owed(books) == 4 * 36

    decide(redis_url, scenario)


@pytest.mark.parametrize("wrong_by_ms", [-2 * DAY_MS, 2 * DAY_MS])
def test_the_fee_of_a_new_model_is_charged_by_the_chains_time_alone(redis_url: str, wrong_by_ms: int) -> None:
    async def scenario(books: Books, served: ServedBooks, machine: Machine) -> None:
        first, second = ({"model_id": f"test/{number}", "num_bytes": GIB} for number in range(2))
        await books.reserve_fetch(BEARER, "fetch-1", **first)
        machine.wall_ms += wrong_by_ms
        await machine.restarts(served)
        # Before the treasury has told the time.
        await books.reserve_fetch(BEARER, "fetch-2", **second)
        await served.bookkeeper.charge_unused()
        await books.hear_time(NOW_MS)
        await served.bookkeeper.charge_unused()
        assert (await books.balance(ADDRESS)).reserved_lamports == 2 * 100
        machine.passes(DAY_MS)
        await served.bookkeeper.charge_unused()
        assert (await books.balance(ADDRESS)).reserved_lamports <= 100

    decide(redis_url, scenario)
