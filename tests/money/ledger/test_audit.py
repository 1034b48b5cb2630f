"""An audit agrees with correct books, and finds what the journal or the wallet does not bear out."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from azu.money.ledger.audit import Audit
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.transfers import CHAIN, Account, Transfer, user_available
from tests.builders import ALICE, OWNERS
from tests.money.ledger import moves
from tests.money.ledger.books import apply_each, with_books

HISTORY = (
    moves.open_key(),
    moves.claim(OWNERS[0]),
    moves.deposit(1_000),
    moves.reserve("settled", 300),
    moves.settle("settled", 100, w0=50, w1=30),
    moves.reserve("open", 200),
    moves.plan_payout("p1", 40),
)
AVAILABLE = user_available(ALICE)


def audited(
    url: str,
    folder: Path,
    history: Iterable[Transfer],
    wallet_lamports: int | None = None,
    change: Callable[[Ledger], object] = lambda ledger: None,
) -> Audit:
    """Apply a history, change the books in memory, then audit."""
    found: list[Audit] = []

    async def scenario(ledger: Ledger) -> None:
        await apply_each(ledger, *history)
        change(ledger)
        found.append(await ledger.audit(wallet_lamports))

    with_books(url, folder, scenario)
    return found[0]


def test_correct_books_agree(redis_url: str, tmp_path: Path) -> None:
    report = audited(redis_url, tmp_path, HISTORY)
    assert report.agrees
    assert report.entries == 1 + len(HISTORY), "the writer's too"
    assert (report.liabilities_lamports, report.revenue_lamports, report.in_transit_lamports) == (980, 20, 40)


def test_empty_books_agree(redis_url: str, tmp_path: Path) -> None:
    assert audited(redis_url, tmp_path, (), wallet_lamports=0).agrees


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda books: books.state.balances.update({AVAILABLE: 501}), f"balances {AVAILABLE} is 501"),
        (lambda books: books.state.balances.update({AVAILABLE: 501}), "sum to -199 lamports"),
        (lambda books: books.state.balances.update({AVAILABLE: -1}), f"{AVAILABLE} stands at -1"),
        (lambda books: books.state.balances.pop(CHAIN), f"balances {CHAIN} is None"),
        (lambda books: books.state.balances.update({Account("bank"): 1}), "'bank' is no account"),
        (lambda books: books.state.reservations.pop("open"), "reservations open is None"),
        (lambda books: books.state.claims.clear(), f"claims {OWNERS[0]}"),
        (lambda books: books.state.keys.clear(), f"keys {moves.key_of(ALICE)}"),
    ],
)
def test_every_change_of_the_books_is_found(
    redis_url: str, tmp_path: Path, change: Callable[[Ledger], object], expected: str
) -> None:
    report = audited(redis_url, tmp_path, HISTORY, change=change)
    assert not report.agrees
    assert any(expected in finding for finding in report.findings), report.findings


@pytest.mark.parametrize(("wallet", "in_flight"), [(1_000, 0), (960, 40), (999, 1)])
def test_a_wallet_may_lack_at_most_what_is_in_transit(
    redis_url: str, tmp_path: Path, wallet: int, in_flight: int
) -> None:
    report = audited(redis_url, tmp_path, HISTORY, wallet)
    assert report.agrees
    assert report.in_flight_lamports == in_flight


@pytest.mark.parametrize(
    ("wallet", "expected"), [(1_001, "1 lamports more"), (959, "lacks 41"), (0, "lacks 1000")]
)
def test_a_wallet_with_any_other_amount_is_found(
    redis_url: str, tmp_path: Path, wallet: int, expected: str
) -> None:
    report = audited(redis_url, tmp_path, HISTORY, wallet)
    assert any(expected in finding for finding in report.findings), report.findings


def test_paid_amounts_have_left_the_wallet(redis_url: str, tmp_path: Path) -> None:
    report = audited(redis_url, tmp_path, (*HISTORY, moves.paid("p1", fee_lamports=1)), 960)
    assert report.agrees
    assert report.in_flight_lamports == report.in_transit_lamports == 0
