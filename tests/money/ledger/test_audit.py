"""An audit agrees with correct books, and finds every single change that was made to them by hand."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from redis import Redis

from azu.errors import AzuError, LedgerError
from azu.money.ledger.audit import Audit, audit
from azu.money.ledger.records import BALANCES, ENTRIES, EXPIRIES, HOLDS, JOURNAL, Snapshot
from azu.money.ledger.redis import RedisLedger
from azu.money.ledger.rules import Entry, LedgerState, Reservation, apply
from azu.money.ledger.transfers import CHAIN, Transfer, user_available, worker_paying
from tests.builders import ALICE, OWNERS
from tests.money.ledger import moves
from tests.money.ledger.opened import apply_all, with_ledger
from tests.money.ledger.strategies import histories

HISTORY = (
    moves.deposit(1_000),
    moves.reserve("settled", 300),
    moves.settle("settled", 100, w0=50, w1=30),
    moves.reserve("open", 200),
    moves.plan_payout("p1", 40),
)
Edit = Callable[[Any], object]


def audited(url: str, history: Iterable[Transfer], edit: Edit, wallet_lamports: int | None = None) -> Audit:
    """Apply a history, change Redis by hand, then audit."""
    found: list[Audit] = []

    async def scenario(ledger: RedisLedger) -> None:
        await apply_all(ledger, *history)
        with Redis.from_url(url, decode_responses=True) as redis:
            edit(redis)
        found.append(await audit(await ledger.snapshot(), ledger.journal(), wallet_lamports))

    with_ledger(url, scenario)
    return found[0]


def honest(redis: Any) -> None:
    """Change nothing."""


def test_correct_books_agree(redis_url: str) -> None:
    report = audited(redis_url, HISTORY, honest)
    assert report.agrees
    assert (report.entries, report.accounts) == (5, 7)
    assert (report.liabilities_lamports, report.revenue_lamports, report.in_transit_lamports) == (980, 20, 40)


def test_empty_books_agree(redis_url: str) -> None:
    assert audited(redis_url, (), honest, wallet_lamports=0).agrees


def rewritten(change: Callable[[int, dict[str, str]], dict[str, str] | None]) -> Edit:
    """Return a function that writes the journal again, with entries changed or left out."""

    def edit(redis: Any) -> None:
        rows = redis.xrange(JOURNAL)
        redis.delete(JOURNAL)
        for stream_id, fields in rows:
            if changed := change(int(stream_id.partition("-")[0]), fields):
                redis.xadd(JOURNAL, changed, id=stream_id)

    return edit


def larger_deposit(number: int, fields: dict[str, str]) -> dict[str, str]:
    if number != 1:
        return fields
    transfer = json.loads(fields["transfer"]) | {"lamports": 1_001}
    return fields | {"transfer": json.dumps(transfer)}


def other_legs(number: int, fields: dict[str, str]) -> dict[str, str]:
    return fields | {"legs": fields["legs"].replace("50", "49")} if number == 3 else fields


def same_again(redis: Any) -> None:
    [(_, fields)] = redis.xrange(JOURNAL, "1-0", "1-0")
    redis.xadd(JOURNAL, fields, id="6-0")


AVAILABLE = user_available(ALICE)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda redis: redis.hincrby(BALANCES, AVAILABLE, 1), AVAILABLE),
        (lambda redis: redis.hincrby(BALANCES, AVAILABLE, 1), "sum to 1"),
        (lambda redis: redis.hset(BALANCES, AVAILABLE, -1), "wrong side"),
        (lambda redis: redis.hset(BALANCES, CHAIN, 1), "wrong side"),
        (lambda redis: redis.hset(BALANCES, "bank", 0), "'bank' is no account"),
        (lambda redis: redis.hdel(BALANCES, AVAILABLE), AVAILABLE),
        (lambda redis: redis.delete(BALANCES), CHAIN),
        (lambda redis: redis.hdel(HOLDS, "job:settled"), "hold job:settled"),
        (
            lambda redis: redis.hset(HOLDS, "job:open", redis.hget(HOLDS, "job:settled")),
            "hold job:open",
        ),
        (lambda redis: redis.hdel(ENTRIES, "deposit:0x01"), "number of deposit:0x01"),
        (lambda redis: redis.hset(ENTRIES, "deposit:0x02", 1), "number of deposit:0x02"),
        (lambda redis: redis.zrem(EXPIRIES, "job:open"), "expiry of job:open"),
        (lambda redis: redis.zadd(EXPIRIES, {"job:settled": 1}), "expiry of job:settled"),
        (lambda redis: redis.xdel(JOURNAL, "2-0"), "entry 3: comes where 2 is missing"),
        (lambda redis: redis.xdel(JOURNAL, "5-0"), "number of p1:planned"),
        (lambda redis: redis.delete(JOURNAL), "number of deposit:0x01"),
        (lambda redis: redis.xadd(JOURNAL, {"by": "hand"}, id="6-0"), "6-0 is damaged"),
        (lambda redis: redis.xadd(JOURNAL, {"by": "hand"}, id="5-1"), "5-1 is damaged"),
        (same_again, "entry 6: deposit:0x01 was entry 1 already"),
        (rewritten(larger_deposit), "entry 1: deposit:0x01 booked -1000 on chain"),
        (rewritten(other_legs), "entry 3: settle:settled booked"),
        (
            rewritten(lambda number, fields: fields if number > 1 else None),
            "entry 2: comes where 1 is missing",
        ),
    ],
)
def test_every_change_by_hand_is_found(redis_url: str, edit: Edit, expected: str) -> None:
    report = audited(redis_url, HISTORY, edit)
    assert not report.agrees
    assert any(expected in finding for finding in report.findings), report.findings


def test_a_history_that_the_rules_forbid_is_found_though_all_sums_are_right(redis_url: str) -> None:
    def overdraw(redis: Any) -> None:
        fields = redis.xrange(JOURNAL, "4-0", "4-0")[0][1]
        content = fields["transfer"].replace("200", "9000")
        legs = fields["legs"].replace("200", "9000")
        redis.xadd(
            JOURNAL, {"at_ms": "1", "transfer": content.replace("open", "more"), "legs": legs}, id="6-0"
        )

    report = audited(redis_url, HISTORY, overdraw)
    assert any("entry 6: the account holds" in finding for finding in report.findings), report.findings


def test_an_error_names_a_stored_value_that_is_no_whole_number(redis_url: str) -> None:
    with pytest.raises(LedgerError, match="chain is stored as"):
        audited(redis_url, HISTORY, lambda redis: redis.hset(BALANCES, CHAIN, "1.5"))


@pytest.mark.parametrize(("wallet", "in_flight"), [(1_000, 0), (960, 40), (999, 1)])
def test_a_wallet_may_lack_at_most_what_is_in_transit(redis_url: str, wallet: int, in_flight: int) -> None:
    report = audited(redis_url, HISTORY, honest, wallet)
    assert report.agrees
    assert report.in_flight_lamports == in_flight


@pytest.mark.parametrize(
    ("wallet", "expected"), [(1_001, "1 lamports more"), (959, "lacks 41"), (0, "lacks 1000")]
)
def test_a_wallet_with_any_other_amount_is_found(redis_url: str, wallet: int, expected: str) -> None:
    report = audited(redis_url, HISTORY, honest, wallet)
    assert any(expected in finding for finding in report.findings), report.findings


def test_paid_amounts_have_left_the_wallet(redis_url: str) -> None:
    report = audited(redis_url, (*HISTORY, moves.paid("p1", fee_lamports=1)), honest, wallet_lamports=960)
    assert report.agrees
    assert report.in_flight_lamports == report.in_transit_lamports == 0


def test_transfers_during_an_audit_do_not_disturb_it(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger) -> None:
        await apply_all(ledger, *HISTORY)
        stored = await ledger.snapshot()
        await apply_all(ledger, moves.refused("p1"), moves.release("open"))
        assert stored.balances[worker_paying(OWNERS[0])] == 40
        assert (await audit(stored, ledger.journal())).agrees

    with_ledger(redis_url, scenario)


@given(history=histories(30))
@settings(max_examples=50, deadline=None)
def test_the_books_of_any_history_agree(history: list[Transfer]) -> None:
    state = LedgerState()
    for transfer in history:
        try:
            state, _ = apply(state, transfer)
        except AzuError:
            continue
    report = with_state(state)
    assert report.agrees, report.findings


def with_state(state: LedgerState) -> Audit:
    """Audit a state of the pure rules."""

    async def journal() -> AsyncIterator[Entry]:
        for entry in state.entries.values():
            yield entry

    stored = Snapshot(
        balances=state.balances,
        holds=state.holds,
        numbers={id_: entry.number for id_, entry in state.entries.items()},
        expiries={
            name: hold.expires_at_ms
            for name, hold in state.holds.items()
            if isinstance(hold, Reservation) and hold.ended_by is None
        },
        length=len(state.entries),
    )
    return asyncio.run(audit(stored, journal()))
