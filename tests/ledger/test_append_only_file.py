"""Of a file cut anywhere, all whole transfers are kept; damage elsewhere than at its end is refused."""

import pytest

from azu.errors import LedgerError
from azu.ledger.append_only_file import Reading, read


def command(*arguments: bytes) -> bytes:
    return b"*%d\r\n" % len(arguments) + b"".join(b"$%d\r\n%b\r\n" % (len(one), one) for one in arguments)


SELECT = command(b"SELECT", b"0")
TRANSFER = command(b"MULTI") + command(b"XADD", b"j", b"1-0", b"a\r\n", b"") + command(b"EXEC")
PLAIN = command(b"SET", b"job", b"x" * 300)
PARTS = [SELECT, TRANSFER, PLAIN, TRANSFER]
FILE = b"".join(PARTS)
ENDS = [sum(len(part) for part in PARTS[:count]) for count in range(len(PARTS) + 1)]


def test_a_whole_file_is_kept_wholly() -> None:
    assert read(FILE) == Reading(len(FILE), ())
    assert read(b"") == Reading(0, ())


def test_a_file_cut_anywhere_is_kept_up_to_its_last_whole_transfer() -> None:
    for cut in range(len(FILE)):
        assert read(FILE[:cut]).whole_bytes == max(end for end in ENDS if end <= cut)


def test_whole_commands_of_an_unfinished_transfer_are_told() -> None:
    torn = SELECT + TRANSFER[: -len(command(b"EXEC"))] + b"*1\r\n$4\r\nEX"
    assert read(torn) == Reading(len(SELECT), ((b"MULTI",), (b"XADD", b"j", b"1-0", b"a\r\n", b"")))


def test_a_byte_that_changed_before_the_last_transfer_never_costs_a_transfer() -> None:
    for at in range(ENDS[3]):
        for byte in b"0123456789*$MX\r\n\0\xff":
            changed = FILE[:at] + bytes([byte]) + FILE[at + 1 :]
            try:
                reading = read(changed)
            except LedgerError:
                continue
            assert reading.whole_bytes == len(FILE), (at, byte)


@pytest.mark.parametrize(
    "rubbish", [b"\0" * 8 + FILE, b"hello\r\n", b"$3\r\nabc\r\n", b"*a\r\n", b"*-1\r\n", b"*1\r\n*1\r\n"]
)
def test_what_is_no_command_is_refused(rubbish: bytes) -> None:
    with pytest.raises(LedgerError, match="begins neither"):
        read(SELECT + rubbish)


def test_a_file_that_begins_with_a_snapshot_is_refused() -> None:
    with pytest.raises(LedgerError, match="redis-check-aof"):
        read(b"REDIS0009" + FILE)


def test_an_empty_command_is_refused() -> None:
    with pytest.raises(LedgerError, match="empty"):
        read(SELECT + b"*0\r\n" + FILE)
