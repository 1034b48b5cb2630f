"""The chain and the treasury's stores in memory, with the rules of devnet and ledger and a clock set by hand.

Every write and post can crash its caller, before or after it took effect.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.devnet.chain import HYPE, USDC, parse_exchange
from azu.devnet.chain import DevnetState as DevnetState
from azu.devnet.server import answer_info
from azu.errors import AzuError
from azu.money.books_view import payouts_numbered
from azu.money.chain.actions import sign_noop, sign_send_asset
from azu.money.chain.api import ChainClient
from azu.money.chain.networks import ChainNetwork, network_at
from azu.money.ledger.entry import Entry, Result, repeat
from azu.money.ledger.posting import apply_once
from azu.money.ledger.state import BooksState
from azu.money.ledger.transfers import Transfer, worker_earned, worker_paid, worker_paying
from azu.money.signer.calls import SignerCalls
from azu.money.signer.views import TransferRequest
from azu.money.treasury.outbox import Payout, PayoutState, decode_payout, encode_payout
from azu.money.treasury.payouts import Payer, PayoutTimeouts
from tests.money.ledger import moves

PLATFORM = Account.from_key("0x" + "0123456789" * 6 + "0123")
USER = "0x" + "a1" * 20
START_MS = 1_790_000_000_000


class Crash(BaseException):
    """The process died here."""


@dataclass
class Clock:
    ms: int = START_MS

    def __call__(self) -> int:
        return self.ms


@dataclass
class CrashPlan:
    """Crashes before or after the n-th effect; the count goes on through restarts."""

    at: int | None = None
    after: bool = False
    effects: int = 0

    def begin(self) -> bool:
        """Count an effect; returns whether to crash once it is done."""
        self.effects += 1
        hit = self.effects == self.at
        if hit and not self.after:
            raise Crash
        return hit

    def end(self, hit: bool) -> None:
        if hit:
            raise Crash


@dataclass
class Line:
    """Faults of the connection to the chain: the chance of each kind of loss, and how late rows come."""

    dice: random.Random = field(default_factory=lambda: random.Random(0))
    lost_before: float = 0.0
    lost_after: float = 0.0
    rows_late_ms: int = 0
    rows_twice: bool = False


class SimulatedChain(ChainClient):
    """The real client over a chain in memory."""

    def __init__(self, clock: Clock, crash: CrashPlan, line: Line) -> None:
        self.line, self.state = line, DevnetState()
        self.posts: list[bytes] = []
        self._clock, self._crash = clock, crash
        transport = httpx.MockTransport(self._answer)
        super().__init__(network_at("http://127.0.0.1:1"), httpx.AsyncClient(transport=transport))

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/info":
            query, twice = json.loads(request.content), self.line.rows_twice
            return httpx.Response(200, json=answer_info(self.state, query, self._clock(), twice=twice))
        return httpx.Response(200, json=self._execute(request.content))

    def _execute(self, body: bytes) -> dict[str, Any]:
        hit = self._crash.begin()
        if self.line.dice.random() < self.line.lost_before:
            raise httpx.ConnectError("lost on the way there")
        self.posts.append(body)
        request, signer, raw = parse_exchange(body)
        late = self.line.dice.randint(0, self.line.rows_late_ms)
        answer = self.state.execute(request, signer, raw, self._clock(), rows_late_ms=late)
        self._crash.end(hit)
        if self.line.dice.random() < self.line.lost_after:
            raise httpx.ReadError("lost on the way back")
        return dict(answer)


@dataclass
class MemoryLedger:
    """The ledger's own rules over books in memory, as far as the treasury calls them."""

    crash: CrashPlan
    state: BooksState = field(default_factory=BooksState)
    entries: dict[str, Entry] = field(default_factory=dict)

    async def apply(self, transfer: Transfer) -> None:
        hit = self.crash.begin()
        self._apply(transfer)
        self.crash.end(hit)

    async def result(self, transfer_id: str) -> Result | None:
        entry = self.entries.get(transfer_id)
        return Result(entry) if entry else None

    async def inside(self) -> int:
        return self.state.inside

    async def numbered(self, since: int) -> tuple[str, ...]:
        return payouts_numbered(self.state, since)

    async def owed(self) -> Mapping[str, int]:
        return {address: self.state.free(worker_earned(address)) for address in self.state.claims}

    def earn(self, address: str, lamports: int, *, claims: bool = True) -> None:
        """Book a user's job whose whole charge goes to the worker, who has claimed what it earns."""
        job = f"job-{len(self.entries)}"
        if claims:
            self._apply(moves.claim(address))
        self._apply(moves.open_key(USER))
        self._apply(moves.deposit(lamports, address=USER, tx_hash=job))
        self._apply(moves.reserve(job, lamports, address=USER))
        settle = moves.settle(job, lamports)
        self._apply(replace(settle, platform_lamports=0, shares={address: lamports}))

    def worker(self, address: str) -> tuple[int, int, int]:
        """Return (earned, paying, paid)."""
        accounts = (worker_earned(address), worker_paying(address), worker_paid(address))
        earned, paying, paid = (self.state.balance(account) for account in accounts)
        return earned, paying, paid

    def _apply(self, transfer: Transfer) -> None:
        if (known := self.entries.get(transfer.id)) is not None:
            repeat(known, transfer)
            return
        legs = apply_once(self.state, transfer, 0)
        self.entries[transfer.id] = Entry(len(self.entries) + 1, transfer, legs)


class KeySigner(SignerCalls):
    """A signer that signs all it is asked, unless it has a refusal."""

    def __init__(self, account: LocalAccount, network: ChainNetwork) -> None:
        self._account, self._network = account, network
        self.refusal: AzuError | None = None

    async def transfer(self, asked: TransferRequest) -> str:
        if self.refusal is not None:
            raise self.refusal
        action = sign_send_asset(
            self._account,
            self._network,
            destination=asked.address,
            lamports=asked.lamports,
            nonce=asked.nonce,
        )
        return action.body.decode()

    async def noop(self, nonce: int) -> str:
        return sign_noop(self._account, self._network, nonce=nonce).body.decode()


class NoWithdrawals:
    """A store in which no withdrawal was refused."""

    async def refusal(self, payout_id: str) -> None:
        return None


@dataclass
class MemoryOutbox:
    crash: CrashPlan
    contents: dict[str, str] = field(default_factory=dict)

    async def open(self) -> tuple[Payout, ...]:
        return tuple(decode_payout(content) for content in self.contents.values())

    async def add(self, payout: Payout) -> bool:
        return self._write(payout.address, None, encode_payout(payout))

    async def replace(self, old: Payout, new: Payout) -> bool:
        return self._write(old.address, encode_payout(old), encode_payout(new))

    async def remove(self, payout: Payout) -> bool:
        return self._write(payout.address, encode_payout(payout), None)

    def _write(self, address: str, old: str | None, new: str | None) -> bool:
        hit = self.crash.begin()
        matches = self.contents.get(address) == old
        if matches and new is None:
            del self.contents[address]
        elif matches and new is not None:
            self.contents[address] = new
        self.crash.end(hit)
        return matches


class Simulation:
    """A platform with funds, its chain, its ledger and its outbox; payers start and end."""

    def __init__(
        self,
        *,
        crash: CrashPlan | None = None,
        line: Line | None = None,
        funds: int = 10**12,
        dollars: int = 10**12,
        former: tuple[str, ...] = (),
    ) -> None:
        self.former = former
        self.clock = Clock()
        self.crash = crash or CrashPlan()
        self.chain = SimulatedChain(self.clock, self.crash, line or Line())
        self.ledger = MemoryLedger(self.crash)
        self.outbox = MemoryOutbox(self.crash)
        self.timeouts = PayoutTimeouts(conclude_ms=600_000)
        self.refused: list[str] = []
        self.platform: LocalAccount = PLATFORM
        self.signer = KeySigner(self.platform, self.chain.network)
        for token, amount in ((HYPE, funds), (USDC, dollars)):
            if amount:
                self.chain.state.fund(self.platform.address.lower(), token, amount, self.clock())

    def payer(self) -> Payer:
        """Return a payer without memory, as in a process that has just started."""
        return Payer(
            self.chain,
            self.ledger,
            self.outbox,
            NoWithdrawals(),
            self.signer,
            self.timeouts,
            platforms=(self.platform.address.lower(), *self.former),
            on_refused=self.refused.append,
            now_ms=self.clock,
        )

    def received(self, address: str) -> list[str]:
        """Return the amounts that the chain's ledger shows for an address."""
        return [str(row.delta["amount"]) for row in self.chain.state.rows.get(address, ())]

    def states(self) -> list[PayoutState]:
        return [decode_payout(content).state for content in self.outbox.contents.values()]

    def is_burned(self) -> bool:
        return any(json.loads(body)["action"]["type"] == "noop" for body in self.chain.posts)
