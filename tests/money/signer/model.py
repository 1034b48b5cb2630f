"""A platform in memory for tests of the signer's policy: a chain, books and a clock set by hand.

The books are a model of their own, as small as the policy allows; a copy of them can be taken and restored.
"""

import hashlib
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count

from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.auth.signatures import Withdrawal, sign_claim, sign_withdrawal
from azu.errors import AzuError
from azu.money.signer.policy import (
    NONCE_LIFE_MS,
    PayoutLimit,
    SignerState,
    SigningRules,
    admit,
    burned,
    first_state,
    look,
    nonce_for,
    undecided,
    void,
)
from azu.money.signer.views import (
    BooksHead,
    BooksView,
    ChainView,
    Credit,
    IncomingRow,
    OpenPayout,
    OutgoingRow,
    PayoutKind,
    TransferRequest,
)

START_MS = 1_790_000_000_000
PLATFORM = "0x" + "0f" * 20
ADMIN: LocalAccount = Account.from_key(f"0x{99:064x}")
PEOPLE: tuple[LocalAccount, ...] = tuple(Account.from_key(f"0x{number:064x}") for number in range(1, 6))
CLAIMS = {account.address.lower(): sign_claim(account, PLATFORM) for account in PEOPLE}
EXPIRES_AT_MS = START_MS + 10**10
UNLIMITED = PayoutLimit(10**15, 10**15, 100)


def rules_of(
    withdrawals: PayoutLimit = UNLIMITED, earnings: PayoutLimit = UNLIMITED, platforms: tuple[str, ...] = ()
) -> SigningRules:
    limits = {PayoutKind.WITHDRAWAL: withdrawals, PayoutKind.EARNINGS: earnings}
    return SigningRules(limits, frozenset({ADMIN.address.lower()}), (PLATFORM, *platforms))


@cache
def asked_withdrawal(account: LocalAccount, lamports: int, number: int) -> tuple[str, str]:
    """Return the id of a withdrawal and its signature, which takes a while to make."""
    asked = Withdrawal(
        address=account.address.lower(), lamports=lamports, nonce=number, expires_at_ms=EXPIRES_AT_MS
    )
    return asked.payout_id, sign_withdrawal(account, asked, PLATFORM)


@dataclass
class ModelChain:
    """The platform's account; each row appears at its own time, with the time at which it happened."""

    now_ms: int = START_MS
    balance: int = 0
    outgoing: list[tuple[int, OutgoingRow]] = field(default_factory=list)
    incoming: list[tuple[int, IncomingRow]] = field(default_factory=list)

    burned: set[int] = field(default_factory=set)

    def deposit(self, address: str, lamports: int, late_ms: int = 0) -> None:
        tx_hash = f"0x{len(self.incoming):064x}"
        row = IncomingRow(f"{self.now_ms}:{tx_hash}", tx_hash, address, lamports, self.now_ms)
        self.balance += lamports
        self.incoming.append((self.now_ms + late_ms, row))

    def execute(self, asked: TransferRequest, late_ms: int = 0) -> bool:
        """Carry a signed transfer out, once for each nonce, if the account holds enough."""
        used = any(row.nonce == asked.nonce for _, row in self.outgoing) or asked.nonce in self.burned
        is_old = asked.nonce <= self.now_ms - NONCE_LIFE_MS
        if used or is_old or asked.lamports > self.balance:
            return False
        self.balance -= asked.lamports
        row = OutgoingRow(self.now_ms, asked.nonce, asked.address, asked.lamports)
        self.outgoing.append((self.now_ms + late_ms, row))
        return True

    def view(self) -> ChainView:
        outgoing = tuple(row for shown_ms, row in self.outgoing if shown_ms <= self.now_ms)
        incoming = tuple(row for shown_ms, row in self.incoming if shown_ms <= self.now_ms)
        return ChainView(self.now_ms, self.balance, outgoing, incoming)

    def sent_to(self, *addresses: str) -> int:
        return sum(row.lamports for _, row in self.outgoing if row.address in addresses)


@dataclass
class ModelBooks:
    """Balances, credits, open payouts and a chain of hashes."""

    users: dict[str, int] = field(default_factory=dict)
    workers: dict[str, int] = field(default_factory=dict)
    platform: int = 0
    hashes: list[str] = field(default_factory=lambda: [""])
    credits: list[tuple[int, Credit]] = field(default_factory=list)
    payouts: dict[str, OpenPayout] = field(default_factory=dict)
    nonces: dict[int, OpenPayout] = field(default_factory=dict)
    unknown: set[OutgoingRow] = field(default_factory=set)
    opened_at_ms: int = 0
    read_until_ms: int = 0

    def copy(self) -> "ModelBooks":
        return deepcopy(self)

    def entry(self, what: str) -> None:
        self.hashes.append(hashlib.sha256(f"{self.hashes[-1]}{what}".encode()).hexdigest())

    def view(self, number: int) -> BooksView:
        open_lamports = sum(payout.lamports for payout in self.payouts.values())
        last = len(self.hashes) - 1
        return BooksView(
            head=BooksHead(last, self.hashes[-1]),
            hash_at=self.hashes[number] if number <= last else "",
            owed_lamports=sum(self.users.values()) + sum(self.workers.values()) + open_lamports,
            revenue_lamports=self.platform,
            credited_lamports=sum(credit.lamports for _, credit in self.credits),
            read_until_ms=self.read_until_ms,
            opened_at_ms=self.opened_at_ms,
            payouts=tuple(self.payouts.values()),
            credits=tuple(credit for at, credit in self.credits if at > number),
            credits_until=last,
        )

    def unknown_in(self, chain: ChainView) -> list[OutgoingRow]:
        """Return the rows that no payout of these books has made and that are not booked yet."""
        return [row for row in chain.outgoing if row not in self.unknown and not self._is_planned(row)]

    def _is_planned(self, row: OutgoingRow) -> bool:
        planned = self.nonces.get(row.nonce or 0)
        return planned is not None and (planned.address, planned.lamports) == (row.address, row.lamports)

    def refuse(self, payout: OpenPayout) -> None:
        """Give back what was set aside."""
        self.entry(f"refused {payout}")
        del self.payouts[payout.payout_id]
        accounts = self.users if payout.kind is PayoutKind.WITHDRAWAL else self.workers
        accounts[payout.address] += payout.lamports

    def read(self, chain: ChainView) -> None:
        """Credit what the chain shows, end payouts that it shows, and book what it shows and is unknown."""
        known = {credit.row for _, credit in self.credits}
        for row in chain.incoming:
            if row.hash not in known:
                self.opened_at_ms = self.opened_at_ms or chain.now_ms
                self.entry(f"deposit {row}")
                self.users[row.sender] = self.users.get(row.sender, 0) + row.lamports
                credit = Credit(row.hash, row.sender, row.lamports, row.at_ms)
                self.credits.append((len(self.hashes) - 1, credit))
        for out in chain.outgoing:
            if self._is_planned(out):
                if self.payouts.pop(self.nonces[out.nonce or 0].payout_id, None):
                    self.entry(f"paid {out}")
            elif out not in self.unknown:
                self.entry(f"unknown {out}")
                self.unknown.add(out)
                rest = out.lamports
                for accounts in (self.users, self.workers):
                    taken = min(rest, accounts.get(out.address, 0))
                    rest -= taken
                    accounts[out.address] = accounts.get(out.address, 0) - taken
                self.platform -= rest
        self.read_until_ms = chain.now_ms

    def job(self, payer: str, worker: str, lamports: int) -> int:
        """Charge a payer as far as he can pay; return what the worker earned, four fifths."""
        charged = min(lamports, self.users.get(payer, 0))
        earned = charged * 4 // 5
        self.entry(f"job {payer} {worker} {charged}")
        self.users[payer] = self.users.get(payer, 0) - charged
        self.workers[worker] = self.workers.get(worker, 0) + earned
        self.platform += charged - earned
        return earned

    def plan_withdrawal(self, account: LocalAccount, lamports: int, number: int, now_ms: int) -> OpenPayout:
        payout_id, proof = asked_withdrawal(account, lamports, number)
        address = account.address.lower()
        planned = self._planned(PayoutKind.WITHDRAWAL, payout_id, address, lamports, now_ms)
        self.users[address] -= lamports
        return self._keep(replace(planned, proof=proof, expires_at_ms=EXPIRES_AT_MS))

    def plan_earnings(self, address: str, lamports: int, now_ms: int) -> OpenPayout:
        payout_id = f"payout:{address}:{len(self.hashes)}-{now_ms}"
        planned = self._planned(PayoutKind.EARNINGS, payout_id, address, lamports, now_ms)
        self.workers[address] -= lamports
        return self._keep(replace(planned, proof=CLAIMS[address]))

    def _planned(
        self, kind: PayoutKind, payout_id: str, address: str, lamports: int, now_ms: int
    ) -> OpenPayout:
        name = address if kind is PayoutKind.EARNINGS else payout_id
        nonces = (nonce_for(kind, name, now_ms, place) for place in count())
        nonce = next(one for one in nonces if one not in self.nonces)
        return OpenPayout(payout_id, kind, address, lamports, nonce)

    def _keep(self, payout: OpenPayout) -> OpenPayout:
        self.entry(f"planned {payout}")
        self.payouts[payout.payout_id] = self.nonces[payout.nonce] = payout
        return payout


@dataclass
class ModelSigner:
    """A signer over one chain and one set of books; `kept` is its file."""

    chain: ModelChain
    books: ModelBooks
    rules: SigningRules = field(default_factory=rules_of)
    kept: SignerState | None = None
    findings: tuple[str, ...] = ()

    def look(self) -> bool:
        """Look at books and chain; return whether something may be signed."""
        number = self.kept.head.number if self.kept else 0
        books, chain = self.books.view(number), self.chain.view()
        found = look(self.kept or first_state(books, chain), books, chain)
        self.kept, self.findings = found.state, found.findings
        return not found.findings

    def may_plan(self, address: str) -> bool:
        """Whether the treasury may plan a payout to an address now."""
        if not self.look():
            return False
        assert self.kept is not None
        books, chain = self.books.view(self.kept.head.number), self.chain.view()
        return all(one.address != address for one in undecided(self.kept, books, chain).values())

    def cancel(self, payout: OpenPayout) -> bool:
        """Never sign a payout; return whether it was not signed before."""
        if self.kept is None:
            return False
        was_signed = payout.nonce in self.kept.signed or payout.nonce < self.kept.since_ms
        self.kept = void(self.kept, self.books.view(0), payout.nonce)
        return not was_signed

    def burn(self) -> None:
        """Use up the nonces of what was signed and is in the books no more, as far as the chain answers."""
        if self.kept is not None:
            books, chain = self.books.view(self.kept.head.number), self.chain.view()
            for nonce, one in undecided(self.kept, books, chain).items():
                if not one.burned_at_ms:
                    self.chain.burned.add(nonce)
                    self.kept = burned(self.kept, nonce, self.chain.now_ms)

    def sign(self, payout: OpenPayout) -> TransferRequest | None:
        """Return the transfer if it was signed."""
        asked = TransferRequest(payout.payout_id, payout.kind, payout.address, payout.lamports, payout.nonce)
        if not self.look():
            return None
        assert self.kept is not None
        books, chain = self.books.view(self.kept.head.number), self.chain.view()
        try:
            self.kept = admit(self.kept, books, chain, asked, self.rules)
        except AzuError:
            return None
        return asked
