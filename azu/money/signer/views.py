"""What the signer sees before it signs: the books at one moment, and the chain's rows and balance."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from pydantic import ConfigDict


class PayoutKind(StrEnum):
    """What a payout takes its money from. Each kind has nonces of its own: the chain's rows tell it."""

    EARNINGS = "earnings"
    WITHDRAWAL = "withdrawal"
    REVENUE = "revenue"


@dataclass(frozen=True, slots=True)
class BooksHead:
    """The last entry of the journal: its number, 0 before the first, and its hash."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    number: int = 0
    hash: str = ""


@dataclass(frozen=True, slots=True)
class OpenPayout:
    """A payout that the books have set money aside for and not ended.

    `proof` is what its owner signed: the claim of earnings, the withdrawal (good until `expires_at_ms`), or
    the text of the admin's command that takes out revenue; empty if there is none.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    payout_id: str
    kind: PayoutKind
    address: str
    lamports: int
    nonce: int
    proof: str = ""
    expires_at_ms: int = 0


@dataclass(frozen=True, slots=True)
class Credit:
    """An entry that books a row of the chain as money that azu holds: a deposit, or suspense.

    `row` is the hash of a deposit's transfer, or the id of a row that no action proves.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    row: str
    sender: str
    lamports: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class BooksView:
    """The books at one moment, for a signer that last saw entry `number`.

    `hash_at` is the hash of that entry, empty if there is none; the first entry is of `opened_at_ms`.
    `owed_lamports` is all that azu holds for others; `revenue_lamports` is the platform's own, and may be
    below zero. `credits` are those after `number`, complete up to entry `credits_until`; `credited_lamports`
    sums all credits since the first entry. The treasury has decided every row of the chain before
    `read_until_ms`.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    head: BooksHead
    hash_at: str
    owed_lamports: int
    revenue_lamports: int
    credited_lamports: int
    read_until_ms: int
    opened_at_ms: int = 0
    payouts: tuple[OpenPayout, ...] = ()
    credits: tuple[Credit, ...] = ()
    credits_until: int = 0


@dataclass(frozen=True, slots=True)
class OutgoingRow:
    """HYPE that left the platform's account; `is_former` if from an address that the platform had before."""

    at_ms: int
    nonce: int | None
    address: str
    lamports: int
    is_former: bool = False


@dataclass(frozen=True, slots=True)
class IncomingRow:
    """What arrived under the name of HYPE. `row` is unique; `hash` is empty where the chain gives none."""

    row: str
    hash: str
    sender: str
    lamports: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class ChainView:
    """The platform's account on the chain: rows of the last days, then the balance, then the chain's clock.

    The rows are read first: a transfer in between makes the balance too small, never too large.
    """

    now_ms: int
    balance_lamports: int
    outgoing: tuple[OutgoingRow, ...] = ()
    incoming: tuple[IncomingRow, ...] = ()


@dataclass(frozen=True, slots=True)
class Room:
    """What may be sent of one kind now: `all_lamports` together, of that `each_lamports` to one address.

    To an address in `left_lamports` only so much; `used_lamports` are what addresses got within a day.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    all_lamports: int
    each_lamports: int
    left_lamports: Mapping[str, int]
    used_lamports: Mapping[str, int]

    def left(self, address: str) -> int:
        """Return what of an address's own share is left, in lamports."""
        return self.left_lamports.get(address, self.each_lamports)


@dataclass(frozen=True, slots=True)
class TransferRequest:
    """What the treasury asks the signer to sign for a payout."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    payout_id: str
    kind: PayoutKind
    address: str
    lamports: int
    nonce: int
