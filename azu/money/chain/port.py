"""The port to a payment chain: what treasury and signer need of one, and the values that cross the port.

azu.money.chain.api is the implementation for Hyperliquid.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from azu.money.chain.networks import ChainNetwork


@dataclass(frozen=True, slots=True)
class LedgerTransfer:
    """One transfer in an account's ledger on the chain. `token_name` is not unique and proves nothing.

    `amount` is the chain's decimal string. `nonce` is the sender's signed nonce, None where it is not known.
    `nth` numbers rows of one answer that are equal in everything else: transfers without a hash may be, and
    so are rows that the chain repeats by mistake.
    """

    time_ms: int
    hash: str
    sender: str
    destination: str
    token_name: str
    amount: str
    to_spot: bool
    nonce: int | None
    nth: int = 0


@dataclass(frozen=True, slots=True)
class TxDetails:
    """What the explorer knows of a hash: `error` is None if the chain executed the action."""

    hash: str
    time_ms: int
    user: str
    action: Mapping[str, Any]
    error: str | None


@dataclass(frozen=True, slots=True)
class Recipient:
    """What the chain says of a recipient.

    A new account costs the sender a fee in another token; `has_fee` says whether the sender holds that much.
    """

    exists: bool
    sanctioned: bool
    has_fee: bool = True


@dataclass(frozen=True, slots=True)
class SignedAction:
    """An action ready for POST /exchange: `body` is sent unchanged, as many times as it takes."""

    nonce: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Refusal:
    """The chain's words for not executing an action, at the time of this post."""

    reason: str
    # Whether the chain admitted an action with this nonce before, maybe this very action; it admits no other.
    nonce_used: bool = False
    # Whether the chain does not know the sender: the account never received anything, or is empty.
    no_account: bool = False


class Chain(Protocol):
    """A payment chain's API. Every method raises ChainError when there is no answer that azu can act on.

    This port has one implementation in azu; a second payment chain is added by a second one.
    """

    network: ChainNetwork

    def ledger_updates(self, user: str, start_ms: int) -> AsyncIterator[tuple[LedgerTransfer, ...]]:
        """Yield the transfers in an account's ledger since `start_ms`, oldest first, page by page.

        Of more rows in one millisecond than a page holds only the first are shown.
        """

    async def tx_details(self, tx_hash: str) -> TxDetails | None:
        """Return what the explorer knows of a hash, None if it does not know the hash (yet)."""

    async def spot_balance(self, user: str) -> int:
        """Return an account's lamports."""

    async def namesakes(self, user: str) -> int:
        """Return the lamports that an account holds of other tokens with the same name."""

    async def now_ms(self) -> int:
        """Return the chain's time."""

    async def recipient(self, user: str, source: str) -> Recipient:
        """Return what the chain says of `user` as the recipient of a transfer from `source`."""

    async def actions_left(self, user: str) -> int:
        """Return how many actions the chain still accepts from an address."""

    async def post_action(self, body: bytes) -> Refusal | None:
        """Post a signed action once; return None when the chain says that it executed the action.

        Raises ChainError when it is unknown whether the chain did: the caller reads the ledger, then posts
        the same bytes again.
        """
