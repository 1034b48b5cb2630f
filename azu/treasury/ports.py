"""What the treasury needs of the world; the adapters are in azu.chain, azu.ledger and azu.treasury.redis."""

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from azu.chain.replies import Destination, LedgerTransfer, Refusal, TxDetails
from azu.chain.tokens import Network
from azu.ledger.rules import Result
from azu.ledger.transfers import Transfer


class Chain(Protocol):
    """The chain's API; every method raises ChainError when there is no answer to act on."""

    network: Network

    def ledger_updates(self, user: str, start_ms: int) -> AsyncIterator[tuple[LedgerTransfer, ...]]:
        """Yield the transfers of an account's ledger since `start_ms`, page by page."""

    async def tx_details(self, tx_hash: str) -> TxDetails | None:
        """Return what the explorer knows of a hash."""

    async def spot_balance(self, user: str) -> int:
        """Return an account's lamports."""

    async def destination(self, user: str, source: str) -> Destination:
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
