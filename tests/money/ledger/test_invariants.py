"""The books are right after any actions of users, jobs, workers and clocks, in any order and number."""

import os
from collections import Counter

import hypothesis
import pytest
from hypothesis import settings
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

from azu.errors import InsufficientBalance, LedgerError, TransferConflict
from azu.money.ledger.rules import LedgerState, apply
from azu.money.ledger.transfers import (
    CHAIN,
    PLATFORM,
    Deposit,
    Expire,
    PayoutPaid,
    PayoutRefused,
    Release,
    Settle,
    Transfer,
)
from tests.money.ledger import moves
from tests.money.ledger.strategies import DEPOSITED, RESERVED, TAKEN, USERS, WORKERS, settlements, transfers

# A rule whose transfer was refused adds nothing to its bundle.
Name = str | MultipleResults[str]


class Books(RuleBasedStateMachine):
    """Money comes in, jobs and payouts begin and end, and every transfer may be sent again."""

    jobs: Bundle[str] = Bundle("jobs")
    payouts: Bundle[str] = Bundle("payouts")
    sent: Bundle[Transfer] = Bundle("sent")

    def __init__(self) -> None:
        super().__init__()
        self.state = LedgerState()
        self.asked = 0

    def send(self, transfer: Transfer) -> bool:
        """Apply a transfer; return whether it was accepted."""
        try:
            self.state, _ = apply(self.state, transfer)
        except (InsufficientBalance, LedgerError, TransferConflict):
            return False
        return True

    def new_name(self, word: str) -> str:
        self.asked += 1
        return f"{word}-{self.asked}"

    @rule(target=sent, user=USERS, lamports=DEPOSITED)
    def a_deposit_arrives(self, user: str, lamports: int) -> Transfer:
        transfer = moves.deposit(lamports, address=user, tx_hash=self.new_name("0x"))
        assert self.send(transfer)
        return transfer

    @rule(target=jobs, user=USERS, lamports=RESERVED)
    def a_job_is_submitted(self, user: str, lamports: int) -> Name:
        job = self.new_name("job")
        return job if self.send(moves.reserve(job, lamports, address=user)) else multiple()

    @rule(target=sent, data=st.data(), job=jobs)
    def a_job_is_settled(self, data: st.DataObject, job: str) -> Transfer:
        transfer = data.draw(settlements(st.just(job)))
        self.send(transfer)
        return transfer

    @rule(target=sent, job=jobs, make=st.sampled_from([moves.release, moves.expire]))
    def a_job_ends_without_a_charge(self, job: str, make: object) -> Transfer:
        assert callable(make)
        transfer: Transfer = make(job)
        self.send(transfer)
        return transfer

    @rule(target=payouts, worker=WORKERS, lamports=TAKEN)
    def a_payout_is_planned(self, worker: str, lamports: int) -> Name:
        payout = self.new_name("p")
        return payout if self.send(moves.plan_payout(payout, lamports, address=worker)) else multiple()

    @rule(target=payouts, user=USERS, lamports=TAKEN)
    def a_user_withdraws(self, user: str, lamports: int) -> Name:
        payout = self.new_name("p")
        return payout if self.send(moves.plan_withdrawal(payout, lamports, address=user)) else multiple()

    @rule(target=sent, payout=payouts, fee=st.integers(0, 3), arrived=st.booleans())
    def a_payout_ends(self, payout: str, fee: int, arrived: bool) -> Transfer:
        transfer = moves.paid(payout, fee_lamports=fee) if arrived else moves.refused(payout)
        self.send(transfer)
        return transfer

    @rule(transfer=sent)
    def a_transfer_is_sent_again(self, transfer: Transfer) -> None:
        before = self.state
        known = before.entries.get(transfer.id)
        if known is not None and known.transfer == transfer:
            after, result = apply(before, transfer)
            assert after is before
            assert result.repeated
            assert result.entry is known
        else:
            # A refused transfer stays refused, or finds its id taken: its hold has not come back.
            assert not self.send(transfer)
            assert self.state is before

    @rule(transfer=transfers())
    def anything_is_sent(self, transfer: Transfer) -> None:
        self.send(transfer)

    @invariant()
    def all_accounts_sum_to_zero(self) -> None:
        assert sum(self.state.balances.values()) == 0

    @invariant()
    def only_the_chain_is_below_zero(self) -> None:
        assert all(lamports >= 0 for account, lamports in self.state.balances.items() if account != CHAIN)
        assert self.state.balances.get(CHAIN, 0) <= 0

    @invariant()
    def every_hash_is_credited_once(self) -> None:
        ids = [entry.transfer.id for entry in self.state.entries.values()]
        assert len(set(ids)) == len(ids)
        for entry in self.state.entries.values():
            if isinstance(entry.transfer, Deposit):
                credited = [leg.lamports for leg in entry.legs if leg.account != CHAIN]
                assert credited == [entry.transfer.lamports]

    @invariant()
    def every_hold_ends_once_and_wholly(self) -> None:
        ends = Counter(
            entry.transfer.job_id
            for entry in self.state.entries.values()
            if isinstance(entry.transfer, Settle | Release | Expire)
        )
        ends += Counter(
            entry.transfer.payout_id
            for entry in self.state.entries.values()
            if isinstance(entry.transfer, PayoutPaid | PayoutRefused)
        )
        assert all(times == 1 for times in ends.values())
        held = sum(hold.lamports for hold in self.state.holds.values() if hold.ended_by is None)
        words = (":reserved", ":paying", ":withdrawing")
        assert held == sum(n for account, n in self.state.balances.items() if account.endswith(words))

    @invariant()
    def shares_and_platform_are_what_was_settled(self) -> None:
        for entry in self.state.entries.values():
            if isinstance(entry.transfer, Settle):
                gained = sum(
                    leg.lamports
                    for leg in entry.legs
                    if leg.account == PLATFORM or leg.account.endswith(":earned")
                )
                assert gained == entry.transfer.charged_lamports

    @invariant()
    def the_journal_adds_up_to_the_balances(self) -> None:
        replayed: Counter[str] = Counter()
        for entry in self.state.entries.values():
            for leg in entry.legs:
                replayed[leg.account] += leg.lamports
        assert replayed == Counter(self.state.balances)


@pytest.mark.parametrize("histories", [200, pytest.param(1_000, marks=pytest.mark.prove)])
def test_the_books_are_right_after_many_histories_of_fifty_steps(histories: int) -> None:
    seeded = hypothesis.seed(int(os.environ.get("AZU_TEST_SEED", "1")))(Books)
    long = settings(max_examples=histories, stateful_step_count=50, deadline=None, database=None)
    run_state_machine_as_test(seeded, settings=long)
