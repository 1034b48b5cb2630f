"""The ledger's accounts, by name.

`chain` is the outside world: what users sent in stands there as a negative balance. `worker:..:paid` is
outside too: what has left to a worker's wallet, kept per worker. All other accounts are money azu holds.
"""

import re
from typing import NewType

from azu.errors import LedgerError

Account = NewType("Account", str)

CHAIN = Account("chain")
PLATFORM = Account("platform")

_ADDRESS = re.compile(r"0x[0-9a-f]{40}")
_ACCOUNT = re.compile(
    rf"chain|platform|user:{_ADDRESS.pattern}:(available|reserved|withdrawing)"
    rf"|worker:{_ADDRESS.pattern}:(earned|paying|paid)"
)


def user_available(address: str) -> Account:
    """What a user may spend or withdraw."""
    return Account(f"user:{checked_address(address)}:available")


def user_reserved(address: str) -> Account:
    """What a user's open jobs hold."""
    return Account(f"user:{checked_address(address)}:reserved")


def user_withdrawing(address: str) -> Account:
    """What is on its way to a user's wallet."""
    return Account(f"user:{checked_address(address)}:withdrawing")


def worker_earned(address: str) -> Account:
    """What a worker earned and no payout has taken up."""
    return Account(f"worker:{checked_address(address)}:earned")


def worker_paying(address: str) -> Account:
    """What is on its way to a worker's wallet."""
    return Account(f"worker:{checked_address(address)}:paying")


def worker_paid(address: str) -> Account:
    """What has arrived in a worker's wallet, all payouts together."""
    return Account(f"worker:{checked_address(address)}:paid")


def checked_address(address: str) -> str:
    """Return the address; raises LedgerError unless it is lower-case 0x and 40 hex digits."""
    if not _ADDRESS.fullmatch(address):
        raise LedgerError(f"{address!r} is not a lower-case address of 0x and 40 hex digits")
    return address


def is_account(name: str) -> bool:
    """Say whether a name is one that this module gives."""
    return _ACCOUNT.fullmatch(name) is not None


def is_outside(account: str) -> bool:
    """Say whether an account stands for money that azu does not hold."""
    return account == CHAIN or account.endswith(":paid")


def is_in_transit(account: str) -> bool:
    """Say whether an account stands for money that may be on the chain already."""
    return account.endswith((":paying", ":withdrawing"))
