"""What the treasury needs of the world; the adapters are in azu.chain, azu.ledger and azu.treasury.redis."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from azu.money.chain.networks import ChainNetwork
from azu.money.ledger.rules import Result
from azu.money.ledger.transfers import Transfer


@dataclass(frozen=True, slots=True)
class LedgerTransfer:
    """One transfer in an account's ledger. `token_name` is not unique and proves nothing.

    `amount` is the decimal string of the chain. `nonce` is the one that the sender signed, where known.
    """

    time_ms: int
    hash: str
    sender: str
    destination: str
    token_name: str
    amount: str
    to_spot: bool
    nonce: int | None


@dataclass(frozen=True, slots=True)
class TxDetails:
    """What the explorer knows of a hash: `error` is None if the action was carried out."""

    hash: str
    time_ms: int
    user: str
    action: Mapping[str, Any]
    error: str | None


@dataclass(frozen=True, slots=True)
class Recipient:
    """What a transfer to an account meets: a new account costs the sender a fee in another token."""

    exists: bool
    sanctioned: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """The chain's words for not carrying out an action, at this time of asking."""

    reason: str

    @property
    def nonce_used(self) -> bool:
        """Whether an action with this nonce was admitted before, maybe this very one.

        No other with the same nonce will be.
        """
        return "duplicate nonce" in self.reason or "nonce too low" in self.reason

    @property
    def no_account(self) -> bool:
        """Whether the chain does not know the sender: it was never paid anything, or was emptied."""
        return self.reason.startswith("Must deposit")


class Chain(Protocol):
    """The chain's API; every method raises ChainError when there is no answer to act on."""

    network: ChainNetwork

    def ledger_updates(self, user: str, start_ms: int) -> AsyncIterator[tuple[LedgerTransfer, ...]]:
        """Yield the transfers of an account's ledger since `start_ms`, page by page."""

    async def tx_details(self, tx_hash: str) -> TxDetails | None:
        """Return what the explorer knows of a hash."""

    async def spot_balance(self, user: str) -> int:
        """Return an account's lamports."""

    async def destination(self, user: str, source: str) -> Recipient:
        """Return what a transfer from `source` to `user` would meet."""

    async def actions_left(self, user: str) -> int:
        """Return how many actions the chain still takes from an address."""

    async def post_action(self, body: bytes) -> Refusal | None:
        """Post a signed action once; ChainError when it is unknown whether it was carried out."""


class Ledger(Protocol):
    """azu's own books."""

    async def apply(self, transfer: Transfer) -> Result:
        """Apply a transfer once, however often it is sent."""

    async def result(self, transfer_id: str) -> Result | None:
        """Return what a transfer did, None if it never was applied."""

    async def balances(self) -> Mapping[str, int]:
        """Return every account's lamports."""


class CursorStore(Protocol):
    """How far the platform's chain ledger was read, durably."""

    async def read(self) -> int:
        """Return the chain time in milliseconds up to which every row is dealt with."""

    async def advance(self, time_ms: int) -> None:
        """Move the cursor forward; an earlier time changes nothing."""


@dataclass(frozen=True, slots=True)
class SignedAction:
    """An action ready for POST /exchange: `body` is sent as it is, as often as it takes."""

    nonce: int
    body: bytes
