"""Addresses and hashes in the chain's form, in lower case: the one place that knows this form."""

import re

from azu.errors import InvalidRequest

# An address in lower case, as a part of longer patterns.
ADDRESS_PATTERN = "0x[0-9a-f]{40}"
_ADDRESS = re.compile(ADDRESS_PATTERN)
_HASH = re.compile("0x[0-9a-f]{64}")


def parse_address(text: str, *, param: str = "address") -> str:
    """Return an address in lower case; raises InvalidRequest if it is not 0x and 40 hex digits."""
    return _parse(_ADDRESS, text, "an address: 0x and 40 hex digits", param)


def parse_hash(text: str, *, param: str = "tx_sig") -> str:
    """Return a hash in lower case; raises InvalidRequest if it is not 0x and 64 hex digits."""
    return _parse(_HASH, text, "a transaction hash: 0x and 64 hex digits", param)


def _parse(pattern: re.Pattern[str], text: str, what: str, param: str) -> str:
    lower = text.lower()
    if pattern.fullmatch(lower) is None:
        raise InvalidRequest(f"{text[:80]!r} is not {what}", param=param)
    return lower
