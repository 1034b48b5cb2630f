"""What a row of an account's ledger on the chain says, and what an action proves of it."""

from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from azu.errors import InvalidRequest
from azu.money.chain.port import Chain, LedgerTransfer, TxDetails
from azu.units import lamports_from_hype

HYPE_NAME = "HYPE"
MULTI_SIGNATURE = "multiSig"
# The chain may show a row this much later than it happened, with its original time.
LATE_MS = 120_000
# The chain drops an emptied account together with its ledger, which proves what was paid; and it removes
# balances below a million lamports.
KEPT_LAMPORTS = 2_000_000
# The nonces that are given out in so long a window of the chain's time are of that window.
NONCE_WINDOW_MS = 600_000
# A nonce is at most so far ahead of the chain's time when it is given out.
NONCE_AHEAD_MS = NONCE_WINDOW_MS
# So many pages of a recipient's ledger are read: he may fill it as he likes.
_MOST_PAGES = 4


def has_no_hash(row: LedgerTransfer) -> bool:
    """Whether no signed action belongs to a row, as when a contract of HyperEVM sent it."""
    return int(row.hash, 16) == 0


def row_id(row: LedgerTransfer) -> str:
    """Return the id of a row, which no other row of the platform's ledger has."""
    tx_hash = "0x0" if has_no_hash(row) else row.hash
    nonce = "-" if row.nonce is None else row.nonce
    return f"{row.time_ms}:{tx_hash}:{row.sender}:{nonce}:{row.amount}:{row.nth}"


def is_sent_by(row: str, senders: Iterable[str]) -> bool:
    """Whether the row with an id was sent by one of these addresses."""
    return any(f":{one}:" in row for one in senders)


def arrived(row: LedgerTransfer, platforms: Collection[str]) -> bool:
    """Whether a row of the platform's ledgers may be a deposit; its token still has to be checked."""
    is_from_outside = row.destination in platforms and row.sender not in platforms
    return is_from_outside and row.to_spot and row.token_name == HYPE_NAME


def left(row: LedgerTransfer, platforms: Collection[str]) -> bool:
    """Whether a row shows that the platform's own transfer took HYPE from its spot balances."""
    stays = row.destination in platforms and row.to_spot
    # A nonce is used once: a row that is equal to another is the same transfer.
    is_repeated = row.nth > 0 and row.nonce is not None
    return row.sender in platforms and row.token_name == HYPE_NAME and not stays and not is_repeated


async def balance_of(chain: Chain, platforms: Iterable[str]) -> int:
    """Return the lamports of all addresses of a platform; raises ChainError."""
    return sum([await chain.spot_balance(one) for one in platforms])


async def namesakes_of(chain: Chain, platforms: Iterable[str]) -> int:
    """Return the lamports that they hold of other tokens with the same name; raises ChainError."""
    return sum([await chain.namesakes(one) for one in platforms])


async def arrival_of(
    chain: Chain, platforms: Collection[str], *, recipient: str, lamports: int, nonce: int
) -> LedgerTransfer | None:
    """Return the row of the platform's transfer with a nonce in its recipient's ledger, else None.

    The platform's own ledger does not show all rows of a crowded millisecond. Raises ChainError.
    """
    wanted, num_pages = (recipient, nonce, HYPE_NAME), 0
    async for page in chain.ledger_updates(recipient, max(0, nonce - NONCE_AHEAD_MS)):
        for row in page:
            known = (row.destination, row.nonce, row.token_name)
            if row.sender in platforms and known == wanted and same_amount(row.amount, lamports):
                return row
        num_pages += 1
        if num_pages == _MOST_PAGES:
            break
    return None


def moved_hype(details: TxDetails, hype: str) -> bool | None:
    """Whether an action moved HYPE by its exact token id; None if the action does not say."""
    if details.error is not None:
        return False
    action: Any = details.action
    if action.get("type") == MULTI_SIGNATURE:
        payload = action.get("payload")
        action = payload.get("action") if isinstance(payload, dict) else None
    token = action.get("token") if isinstance(action, Mapping) else None
    return None if token is None else bool(token == hype)


def lamports_of(row: LedgerTransfer) -> int | None:
    """Return a row's amount, None if it is not a whole number of lamports."""
    try:
        return lamports_from_hype(row.amount)
    except InvalidRequest:
        return None


def same_amount(amount: str, lamports: int) -> bool:
    """Whether a decimal amount of HYPE is exactly that many lamports."""
    try:
        return Decimal(amount) == Decimal(lamports).scaleb(-8)
    except InvalidOperation:
        return False
