"""Random histories of a platform: what left its account never exceeds what policy and owners allow."""

import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from pydantic import TypeAdapter

from azu.money.chain.rows import LATE_MS
from azu.money.signer.policy import (
    DAY_MS,
    QUARANTINE_MS,
    PayoutLimit,
    SignerState,
    accept,
    kind_of,
)
from azu.money.signer.views import BooksHead, OutgoingRow, PayoutKind, TransferRequest
from tests.money.signer.model import PEOPLE, ModelBooks, ModelChain, ModelSigner, rules_of

HOUR_MS = DAY_MS // 24
# One owner: a key that pays, and two nodes. The others are strangers to each other.
PAYER, NODE_1, NODE_2, STRANGER, HOST = (account.address.lower() for account in PEOPLE)
OWNED = (PAYER, NODE_1, NODE_2)
ACCOUNTS = dict(zip((PAYER, NODE_1, NODE_2, STRANGER, HOST), PEOPLE, strict=True))
LIMIT = PayoutLimit(hour_lamports=150, day_lamports=500, address_percent=60)
STATE = TypeAdapter(SignerState)
MOVES = ("withdraw", "pay", "sign", "sign", "execute", "time", "restart", "burn")
ALL = ("deposit", "job", "job", *MOVES)
# A chain that answers at once.
PROMPT = ("withdraw", "pay", "send", "send", "time", "restart", "burn")
FIRST = 1_000_000 * int(os.environ.get("AZU_TEST_SEED", "1"))
# More of them run in `make prove`.
SEEDS = [
    *range(FIRST, FIRST + 8),
    *(pytest.param(FIRST + number, marks=pytest.mark.prove) for number in range(8, 250)),
]


@dataclass
class Rights:
    """What came in: deposits and earnings by address, and what others paid the owner's addresses."""

    of: Counter[str] = field(default_factory=Counter)
    owner: int = 0


@dataclass
class Platform:
    """One copy of the books with its signer and its treasury; `posted` are transfers that may execute."""

    chain: ModelChain
    books: ModelBooks
    signer: ModelSigner
    posted: list[TransferRequest] = field(default_factory=list)
    withdrawals: int = 0

    @classmethod
    def start(cls, chain: ModelChain, *, limit: PayoutLimit | None = None) -> "Platform":
        books = ModelBooks()
        rules = rules_of(limit, limit) if limit else rules_of()
        return cls(chain, books, ModelSigner(chain, books, rules))

    def copy(self) -> "Platform":
        """Return a copy of the store, which a signer finds that remembers nothing of it."""
        books = self.books.copy()
        signer = ModelSigner(self.chain, books, self.signer.rules)
        return Platform(self.chain, books, signer, withdrawals=self.withdrawals + 1_000_000)

    def restart(self) -> None:
        """Go on from what the signer's file holds."""
        if self.signer.kept is not None:
            self.signer.kept = STATE.validate_json(STATE.dump_json(self.signer.kept))

    def restore(self, books: ModelBooks) -> None:
        """Put older books in the place of these."""
        self.books = self.signer.books = books.copy()
        # The users' numbers go on.
        self.withdrawals += 1_000

    def accept(self) -> None:
        """Carry out the admin's command to go on with the books as they are."""
        last, kept = len(self.books.hashes) - 1, self.signer.kept
        assert kept is not None
        view = self.books.view(last)
        head = BooksHead(last, view.hash_at)
        self.signer.kept = accept(kept, view, head, kept.last_command + 1, self.chain.now_ms)

    def read(self) -> None:
        """Read the chain's rows; before an unknown one is booked, give up what its address was to get."""
        view = self.chain.view()
        for row in self.books.unknown_in(view):
            for payout in tuple(self.books.payouts.values()):
                if payout.address == row.address and self.signer.cancel(payout):
                    self.books.refuse(payout)
        self.books.read(view)

    def withdraw(self, address: str, lamports: int) -> None:
        """Plan a withdrawal as the treasury does: with all rows read, and while the signer would sign."""
        self.read()
        if self.books.users.get(address, 0) >= lamports and self.signer.may_plan(address):
            self.withdrawals += 1
            self.books.plan_withdrawal(ACCOUNTS[address], lamports, self.withdrawals, self.chain.now_ms)

    def pay(self, address: str) -> None:
        """Plan a payout of all that an address earned."""
        self.read()
        earned = self.books.workers.get(address, 0)
        if earned and self.signer.may_plan(address):
            self.books.plan_earnings(address, earned, self.chain.now_ms)

    def sign(self, dice: random.Random) -> None:
        if self.books.payouts:
            asked = self.signer.sign(dice.choice(list(self.books.payouts.values())))
            if asked is not None:
                self.posted.append(asked)

    def execute(self, dice: random.Random) -> None:
        """Have the chain execute a transfer that was posted, now or when it was posted twice."""
        if self.posted:
            self.chain.execute(dice.choice(self.posted), late_ms=dice.choice([0, 0, 500, LATE_MS - 1]))

    def step(self, dice: random.Random, rights: Rights, among: Sequence[str] = ALL) -> None:
        """Do something that happens on a platform."""
        match dice.choice(among):
            case "deposit":
                address, lamports = dice.choice([PAYER, STRANGER]), dice.randrange(1, 60)
                self.chain.deposit(address, lamports, late_ms=dice.choice([0, 400, LATE_MS - 1]))
                rights.of[address] += lamports
                rights.owner += lamports if address in OWNED else 0
            case "job":
                payer, worker = dice.choice([PAYER, STRANGER]), dice.choice([NODE_1, NODE_2, HOST])
                earned = self.books.job(payer, worker, dice.randrange(1, 50))
                rights.of[worker] += earned
                rights.owner += earned if worker in OWNED and payer not in OWNED else 0
            case "withdraw":
                # A few amounts, so that few signatures have to be made.
                self.withdraw(dice.choice([PAYER, STRANGER]), dice.choice([5, 20]))
            case "pay":
                self.pay(dice.choice([NODE_1, NODE_2, HOST]))
            case "sign":
                self.sign(dice)
            case "execute":
                self.execute(dice)
            case "send":
                self.sign(dice)
                for asked in self.posted:
                    self.chain.execute(asked)
            case "time":
                self.chain.now_ms += dice.choice([1, 1_000, 60_000, HOUR_MS // 2, 5 * HOUR_MS])
            case "restart":
                self.restart()
            case "burn":
                self.signer.burn()
        if dice.random() < 0.5:
            self.read()

    def settle(self, dice: random.Random) -> None:
        """Let time pass until nothing moves any more, with an admin who accepts what there is."""
        for _ in range(60):
            self.chain.now_ms += QUARANTINE_MS // 2
            self.read()
            if not self.signer.look() and self.signer.kept and self.signer.kept.halt:
                self.accept()
            self.signer.burn()
            self.sign(dice)
            for asked in self.posted:
                self.chain.execute(asked)
        self.read()
        self.signer.look()


def assert_no_payout_was_sent_twice(platform: Platform) -> None:
    ids = {asked.nonce: asked.payout_id for asked in platform.posted}
    sent = Counter(ids[row.nonce] for _, row in platform.chain.outgoing if row.nonce is not None)
    assert not [name for name, times in sent.items() if times > 1]


def assert_owners_got_at_most_their_own(chain: ModelChain, rights: Rights) -> None:
    assert chain.sent_to(*OWNED) <= rights.owner
    assert chain.balance >= 0


@pytest.mark.parametrize("seed", SEEDS)
def test_an_owner_who_pays_himself_gets_no_more_than_he_and_others_brought(seed: int) -> None:
    dice, rights, chain = random.Random(seed), Rights(), ModelChain()
    platform = Platform.start(chain)
    for _ in range(80):
        platform.step(dice, rights)
    platform.settle(dice)

    assert_owners_got_at_most_their_own(chain, rights)
    assert_no_payout_was_sent_twice(platform)
    assert platform.signer.findings == ()
    assert not platform.books.unknown


@pytest.mark.parametrize("seed", SEEDS)
def test_no_hour_and_no_day_sees_more_than_the_limit_whatever_restarts(seed: int) -> None:
    dice, chain = random.Random(seed), ModelChain()
    platform = Platform.start(chain, limit=LIMIT)
    for _ in range(120):
        platform.step(dice, Rights())
    platform.settle(dice)

    rows = [row for _, row in chain.outgoing]
    for kind in (PayoutKind.WITHDRAWAL, PayoutKind.EARNINGS):
        mine = [row for row in rows if kind_of(row.nonce) is kind]
        for last in mine:
            for span_ms, most, _ in LIMIT.spans():
                within = [row for row in mine if last.at_ms - span_ms < row.at_ms <= last.at_ms]
                assert sum(row.lamports for row in within) <= most
                to_one = sum(row.lamports for row in within if row.address == last.address)
                assert to_one <= most * LIMIT.address_percent // 100


@pytest.mark.parametrize("seed", SEEDS)
def test_books_restored_against_a_chain_that_moved_on_pay_nothing_twice(seed: int) -> None:
    dice, rights, chain = random.Random(seed), Rights(), ModelChain()
    platform = Platform.start(chain)
    for _ in range(60):
        platform.step(dice, rights)
    saved, number = platform.books.copy(), len(chain.outgoing)
    for _ in range(60):
        platform.step(dice, rights, MOVES)
    lost = {row for _, row in chain.outgoing[number:] if row.nonce not in saved.nonces}
    platform.restore(saved)
    if lost:
        assert not platform.signer.look()
    for _ in range(40):
        platform.step(dice, rights)
        if platform.signer.kept and platform.signer.kept.halt and dice.random() < 0.2:
            platform.accept()
    platform.settle(dice)

    assert_owners_got_at_most_their_own(chain, rights)
    assert_no_payout_was_sent_twice(platform)
    assert lost <= platform.books.unknown
    for address in ACCOUNTS:
        assert chain.sent_to(address) <= rights.of[address]


@pytest.mark.parametrize("seed", SEEDS)
def test_two_copies_at_once_pay_nothing_twice(seed: int) -> None:
    dice, rights, chain = random.Random(seed), Rights(), ModelChain()
    first = Platform.start(chain)
    for _ in range(60):
        first.step(dice, rights)
    first.settle(dice)
    second = first.copy()
    for _ in range(100):
        dice.choice([first, second]).step(dice, rights, PROMPT)
        # An admin who does not know of the other copy.
        if second.signer.kept and second.signer.kept.halt and dice.random() < 0.1:
            second.accept()

    for address in ACCOUNTS:
        assert chain.sent_to(address) <= rights.of[address]


@pytest.mark.parametrize("with_key", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_a_theft_ends_all_signing(seed: int, with_key: bool) -> None:
    dice, rights, chain = random.Random(seed), Rights(), ModelChain()
    platform = Platform.start(chain)
    chain.deposit(STRANGER, 10)
    for _ in range(60):
        platform.step(dice, rights)
    platform.settle(dice)
    chain.balance -= 1
    if with_key:
        # What the platform earned may cover it; that another process has the key remains.
        chain.outgoing.append((chain.now_ms, OutgoingRow(chain.now_ms, chain.now_ms, "0x" + "7e" * 20, 1)))
    posted = len(platform.posted)
    for _ in range(40):
        platform.step(dice, rights, ("job", *MOVES))

    assert len(platform.posted) == posted
