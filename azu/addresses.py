"""Addresses and hashes as the chain writes them, in lower case."""

import re

from azu.errors import InvalidRequest

_ADDRESS = re.compile(r"0x[0-9a-f]{40}")
_HASH = re.compile(r"0x[0-9a-f]{64}")


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
