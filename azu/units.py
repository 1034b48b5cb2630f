"""Amounts and sizes: lamports and HYPE, bytes and MiB.

One lamport is 10^-8 HYPE, the smallest amount HyperCore can move. Money is an `int` of lamports
everywhere; decimal strings exist only at the chain's edge and in output for people.
"""

import re
import reprlib
from decimal import Context, Decimal, DecimalException, InvalidOperation, Rounded

from azu.errors import InvalidRequest

LAMPORTS_PER_HYPE = 10**8
# All HYPE that can exist: 10^9 of 10^8 lamports each.
MAX_LAMPORTS = 10**17
KIB = 1024
MIB = 1024**2
GIB = 1024**3

# A product of more digits raises Rounded.
_EXACT = Context(prec=28, traps=[InvalidOperation, Rounded])
_PER_HYPE = Decimal(LAMPORTS_PER_HYPE).normalize()  # one digit
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", re.IGNORECASE)
_SIZE_FACTORS = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1024**4}


def lamports_from_hype(amount: str) -> int:
    """Return the lamports of a decimal HYPE string such as "1.25", exactly.

    Raises InvalidRequest for anything that is not a decimal of at most 28 digits, at most eight of them
    behind the point, and for more than all HYPE that can exist.
    """
    try:
        lamports = _EXACT.multiply(Decimal(amount), _PER_HYPE)
        exact = abs(lamports) <= MAX_LAMPORTS and lamports == lamports.to_integral_value()
    except (DecimalException, ValueError, TypeError):
        exact = False
    if not exact:
        raise InvalidRequest(
            f"{reprlib.repr(amount)} is not an amount of HYPE: at most 10^9, with at most 8 decimals",
            param="amount",
        )
    return int(lamports)


def hype_from_lamports(lamports: int) -> str:
    """Return lamports as a plain decimal HYPE string without an exponent or trailing zeros."""
    sign = "-" if lamports < 0 else ""
    whole, fraction = divmod(abs(lamports), LAMPORTS_PER_HYPE)
    digits = f"{fraction:08d}".rstrip("0")
    return f"{sign}{whole}.{digits}" if digits else f"{sign}{whole}"


def parse_bytes(size: str | int) -> int:
    """Return the bytes of a size such as "24GiB", "512MiB", "800M" or a plain number.

    K, M, G and T are powers of 1024 with or without the "i". Raises InvalidRequest otherwise.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise InvalidRequest(f"{reprlib.repr(size)} is not a size; write it like 24GiB or 512MiB")
    factor = _SIZE_FACTORS[match[2].lower().rstrip("b").rstrip("i")]
    return int(Decimal(match[1]) * factor)


def format_bytes(size: int) -> str:
    """Return a size as people read it, in the largest binary unit in which it is at least one."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
