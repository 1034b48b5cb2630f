"""The books are right after any actions of users, jobs, workers, admins and clocks, in any order."""

import os

import hypothesis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from azu.errors import AzuError
from azu.money.ledger.journal import BEGIN as FIRST
from azu.money.ledger.journal import Line, follow, write_line
from azu.money.ledger.posting import apply_once, post
from azu.money.ledger.state import BooksState, Draft, decode_state, encode_state
from azu.money.ledger.transfers import CHAIN, HELD, PLATFORM, SUSPENSE, Transfer, UnknownOut
from tests.money.ledger import moves
from tests.money.ledger.kinds import (
    BEGIN,
    DEPOSITED,
    PAUSES,
    RESERVED,
    TAKEN,
    USERS,
    WORKERS,
    any_transfer,
    histories_of_all_kinds,
    settled,
)

# A rule whose transfer was refused adds nothing to its bundle.
Name = str | MultipleResults[str]


def unsound(state: BooksState) -> list[str]:
    """Return what is wrong with books that no money left by an unknown way."""
    balances = state.balances
    held = sum(n for account, n in balances.items() if account.startswith("held:"))
    transit = sum(n for account, n in balances.items() if account.endswith((":paying", ":withdrawing")))
    locked = sum(n for account, n in state.locked.items())
    checks = {
        "the sum": sum(balances.values()) == 0,
        "only the chain is below zero": all(n > 0 for account, n in balances.items() if account != CHAIN),
        "what is locked is there": all(state.free(account) >= 0 for account in state.locked),
        "locks": locked == sum(paid.lamports for paid in state.unmatured.values()),
        "disputes": balances.get(HELD, 0) == sum(paid.lamports for paid in state.disputes.values()),
        "reservations": sum(hold.lamports for hold in state.reservations.values())
        == sum(n for account, n in balances.items() if account.endswith(":reserved")),
        "payouts": sum(payout.lamports for payout in state.payouts.values()) == transit,
        "suspense": balances.get(SUSPENSE, 0) == sum(row.lamports for row in state.suspense.values()),
        "limits": all(
            key.spend_limit_lamports is None or state.spent.get(key_id, 0) <= key.spend_limit_lamports
            for key_id, key in state.keys.items()
        ),
        "counts": all(n > 0 for n in state.spent.values()),
        "held": held >= 0,
    }
    return [name for name, is_right in checks.items() if not is_right]


class EveryKind(RuleBasedStateMachine):
    """Money comes in, jobs and payouts begin and end, are disputed and reversed, and time passes."""

    jobs: Bundle[str] = Bundle("jobs")
    payouts: Bundle[str] = Bundle("payouts")

    def __init__(self) -> None:
        super().__init__()
        self.state = BooksState()
        self.used: set[str] = set()
        self.now_ms = 1
        self.asked = 0
        self.deposited = self.left = 0
        for transfer in BEGIN:
            assert self.send(transfer)

    def send(self, transfer: Transfer) -> bool:
        """Apply a transfer; return whether it was accepted. A refused one has changed nothing."""
        if transfer.id in self.used:
            return False
        draft = Draft(self.state, self.now_ms)
        draft.keep()
        was = encode_state(self.state)
        try:
            apply_once(self.state, transfer, self.now_ms)
        except AzuError:
            assert encode_state(self.state) == was
            return False
        self.used.add(transfer.id)
        return True

    def new_name(self, word: str) -> str:
        self.asked += 1
        return f"{word}-{self.asked}"

    @rule(pause=PAUSES)
    def time_passes(self, pause: int) -> None:
        self.now_ms += pause

    @rule(user=USERS, lamports=DEPOSITED)
    def a_deposit_arrives(self, user: str, lamports: int) -> None:
        assert self.send(moves.deposit(lamports, address=user, tx_hash=self.new_name("0x")))

    @rule(target=jobs, user=USERS, lamports=RESERVED)
    def a_job_is_submitted(self, user: str, lamports: int) -> Name:
        job = self.new_name("job")
        return job if self.send(moves.reserve(job, lamports, address=user)) else multiple()

    @rule(data=st.data(), job=jobs)
    def a_job_is_settled(self, data: st.DataObject, job: str) -> None:
        self.send(data.draw(settled(st.just(job))))

    @rule(job=jobs, make=st.sampled_from([moves.release, moves.expire]))
    def a_job_ends_without_a_charge(self, job: str, make: object) -> None:
        assert callable(make)
        self.send(make(job))

    @rule(job=jobs, make=st.sampled_from([moves.dispute, moves.dismiss, moves.reverse]))
    def a_job_is_disputed_or_decided(self, job: str, make: object) -> None:
        assert callable(make)
        before = self.state.balance(CHAIN)
        self.send(make(job))
        assert self.state.balance(CHAIN) == before

    @rule(target=payouts, worker=WORKERS, lamports=TAKEN)
    def a_payout_is_planned(self, worker: str, lamports: int) -> Name:
        payout = self.new_name("p")
        return payout if self.send(moves.plan_payout(payout, lamports, address=worker)) else multiple()

    @rule(target=payouts, user=USERS, lamports=TAKEN)
    def a_user_withdraws(self, user: str, lamports: int) -> Name:
        payout = self.new_name("p")
        return payout if self.send(moves.plan_withdrawal(payout, lamports, address=user)) else multiple()

    @rule(target=payouts, lamports=TAKEN)
    def revenue_is_taken(self, lamports: int) -> Name:
        payout = self.new_name("p")
        return payout if self.send(moves.take_revenue(payout, lamports)) else multiple()

    @rule(payout=payouts, fee=st.integers(0, 3), arrived=st.booleans())
    def a_payout_ends(self, payout: str, fee: int, arrived: bool) -> None:
        self.send(moves.paid(payout, fee_lamports=fee) if arrived else moves.refused(payout))

    @rule(transfer=any_transfer().filter(lambda transfer: not isinstance(transfer, UnknownOut)))
    def anything_is_sent(self, transfer: Transfer) -> None:
        self.send(transfer)

    @invariant()
    def the_books_are_sound(self) -> None:
        assert unsound(self.state) == []

    @invariant()
    def nothing_is_open_twice(self) -> None:
        assert not self.state.unmatured.keys() & self.state.disputes.keys()
        assert not self.state.unmatured.keys() & self.state.reservations.keys()

    def teardown(self) -> None:
        assert decode_state(encode_state(self.state)) == self.state


@pytest.mark.parametrize("histories", [30, pytest.param(1_000, marks=pytest.mark.prove)])
def test_the_books_are_right_after_many_histories_of_fifty_steps(histories: int) -> None:
    seeded = hypothesis.seed(int(os.environ.get("AZU_TEST_SEED", "1")))(EveryKind)
    long = settings(max_examples=histories, stateful_step_count=50, deadline=None, database=None)
    run_state_machine_as_test(seeded, settings=long)


def journal_of(history: list[tuple[int, Transfer]]) -> tuple[BooksState, list[Line]]:
    """Apply what is allowed of a history; return the books and the journal's lines."""
    state, head, now_ms, used, lines = BooksState(), FIRST, 1, set(), []
    for pause, transfer in history:
        now_ms += pause
        if transfer.id in used:
            continue
        try:
            legs = apply_once(state, transfer, now_ms)
        except AzuError:
            continue
        used.add(transfer.id)
        line = write_line(head, now_ms, transfer, legs)
        lines.append(line)
        head = line.head
    return state, lines


@given(history=histories_of_all_kinds(40))
@settings(max_examples=100, deadline=None)
def test_the_journal_alone_gives_the_same_books(history: list[tuple[int, Transfer]]) -> None:
    state, lines = journal_of(history)
    replayed, head = BooksState(), FIRST
    for line in lines:
        follow(replayed, head, line)
        head = line.head
    assert replayed == state


@given(history=histories_of_all_kinds(40), data=st.data())
@settings(max_examples=100, deadline=None)
def test_transfers_that_are_worked_out_together_do_the_same_as_one_by_one(
    history: list[tuple[int, Transfer]], data: st.DataObject
) -> None:
    """The groups are of any size; in each, time stands still."""
    grouped, single, now_ms, used = BooksState(), BooksState(), 1, set()
    while history:
        size = data.draw(st.integers(1, 8))
        group, history = history[:size], history[size:]
        now_ms += sum(pause for pause, _ in group)
        draft = Draft(grouped, now_ms)
        was = encode_state(grouped)
        for _, transfer in group:
            if transfer.id in used:
                continue
            together = alone = None
            try:
                together = post(draft, transfer)
                used.add(transfer.id)
            except AzuError as error:
                together = str(error)
            try:
                alone = apply_once(single, transfer, now_ms)
            except AzuError as error:
                alone = str(error)
            assert together == alone
        assert encode_state(grouped) == was, "a draft shows nothing until it is kept"
        draft.keep()
        Draft(single, now_ms).keep()
        assert grouped == single
        assert list(grouped.unmatured) == list(single.unmatured)


@given(history=histories_of_all_kinds(40))
@settings(max_examples=100, deadline=None)
def test_money_that_left_by_an_unknown_way_is_the_only_debt(history: list[tuple[int, Transfer]]) -> None:
    state, _ = journal_of(history)
    assert sum(state.balances.values()) == 0
    assert all(n > 0 for account, n in state.balances.items() if account not in (CHAIN, PLATFORM))
    assert all(state.free(account) >= 0 for account in state.locked if account != PLATFORM)


@given(history=histories_of_all_kinds(60))
@settings(max_examples=100, deadline=None)
def test_nothing_that_a_job_paid_leaves_before_it_has_matured(history: list[tuple[int, Transfer]]) -> None:
    """With every payout planned at once, what is left of a job's money covers its reversal."""
    state, _ = journal_of(history)
    nonce = 10**6
    for account in list(state.balances):
        if account.endswith(":earned") and (free := state.free(account)) > 0:
            address, nonce = account.split(":")[1], nonce + 1
            apply_once(state, moves.claim(address), 0)
            apply_once(state, moves.plan_payout(f"all-{nonce}", free, address=address, nonce=nonce), 0)
    for job_id, paid in list(state.unmatured.items()):
        before = state.balance(f"user:{paid.payer}:available")
        apply_once(state, moves.reverse(job_id), 0)
        assert state.balance(f"user:{paid.payer}:available") == before + paid.lamports
    assert all(n > 0 for account, n in state.balances.items() if account not in (CHAIN, PLATFORM))
