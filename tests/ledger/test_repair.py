"""A torn file is refused by Redis and mended by azu, to the last whole transfer and not a byte further."""

import asyncio
from pathlib import Path

import pytest

from azu.errors import Conflict, LedgerError, NotFound
from azu.ledger.accounts import user_available
from azu.ledger.audit import audit
from azu.ledger.durable import APPEND_ONLY_FILE, DURABLE_CONFIG
from azu.ledger.redis import RedisLedger
from azu.ledger.repair import repair
from tests.builders import ALICE
from tests.ledger import moves
from tests.ledger.opened import with_ledger
from tests.redis_server import RedisDidNotStart, start_redis

TRANSFERS = 8


@pytest.fixture
def torn(tmp_path: Path) -> tuple[Path, list[int]]:
    """A durable file of some deposits; the list holds its size after each of them."""
    file = tmp_path / APPEND_ONLY_FILE
    sizes: list[int] = []

    async def deposits(ledger: RedisLedger) -> None:
        for number in range(1, TRANSFERS + 1):
            await ledger.apply(moves.deposit(number, tx_hash=f"0x{number}"))
            sizes.append(file.stat().st_size)

    server = start_redis(tmp_path, DURABLE_CONFIG)
    with_ledger(server.url, deposits)
    server.kill()
    return file, sizes


def deposited(folder: Path) -> list[int]:
    """Start Redis on the file, audit it, and return the amounts that were credited."""
    amounts: list[int] = []

    async def read(ledger: RedisLedger) -> None:
        report = await audit(await ledger.snapshot(), ledger.journal())
        assert report.agrees, report.findings
        amounts.extend([entry.legs[1].lamports async for entry in ledger.journal()])
        assert await ledger.balance(user_available(ALICE)) == sum(amounts)
        again = await ledger.apply(moves.deposit(TRANSFERS, tx_hash=f"0x{TRANSFERS}"))
        assert again.repeated == (TRANSFERS in amounts)

    server = start_redis(folder, DURABLE_CONFIG)
    with_ledger(server.url, read)
    server.stop()
    return amounts


BOOKED = b"*4\r\n$7\r\nHINCRBY"


@pytest.mark.parametrize(
    ("behind", "more", "readable"),
    [(BOOKED, 0, True), (BOOKED, 15, True), (b"XADD", 30, False), (b"MULTI", 2, False), (b"*1", 1, False)],
)
def test_a_torn_tail_is_refused_then_mended(
    torn: tuple[Path, list[int]], behind: bytes, more: int, readable: bool
) -> None:
    file, sizes = torn
    content = file.read_bytes()
    cut = content.index(behind, sizes[-2]) + more
    file.write_bytes(content[:cut])
    with pytest.raises(RedisDidNotStart, match="Unexpected end of file"):
        start_redis(file.parent, DURABLE_CONFIG)

    done = repair(file)

    assert done.kept_bytes == file.stat().st_size == sizes[-2]
    assert done.dropped_bytes == cut - sizes[-2]
    assert done.saved_to is not None
    assert Path(done.saved_to).read_bytes() == content[sizes[-2] : cut]
    assert Path(done.saved_to).stat().st_mode & 0o777 == 0o600
    assert done.dropped_transfers == ((f"deposit:0x{TRANSFERS}",) if readable else ())
    assert deposited(file.parent) == list(range(1, TRANSFERS))


def test_a_whole_file_is_left_as_it_is(torn: tuple[Path, list[int]]) -> None:
    file, sizes = torn
    content = file.read_bytes()
    done = repair(file)
    assert (done.dropped_bytes, done.saved_to, done.kept_bytes) == (0, None, sizes[-1])
    assert file.read_bytes() == content
    assert deposited(file.parent) == list(range(1, TRANSFERS + 1))


def test_zeros_that_a_power_cut_left_are_cut_off(torn: tuple[Path, list[int]]) -> None:
    file, sizes = torn
    content = file.read_bytes()
    file.write_bytes(content[: sizes[-2] + 30] + bytes(200_000))
    assert repair(file).kept_bytes == sizes[-2]
    assert deposited(file.parent) == list(range(1, TRANSFERS))


def test_a_second_repair_of_the_same_tail_keeps_both_tails(torn: tuple[Path, list[int]]) -> None:
    file, _ = torn
    content = file.read_bytes()
    tails = []
    for cut in (len(content) - 3, len(content) - 7):
        file.write_bytes(content[:cut])
        tails.append(repair(file).saved_to)
    assert len(set(tails)) == 2
    assert all(tail is not None and Path(tail).exists() for tail in tails)


def test_damage_before_the_end_is_refused_and_nothing_changed(torn: tuple[Path, list[int]]) -> None:
    file, sizes = torn
    content = bytearray(file.read_bytes())
    content[sizes[2] + 1] = ord("9")
    file.write_bytes(content)
    with pytest.raises(LedgerError, match=APPEND_ONLY_FILE):
        repair(file)
    assert file.read_bytes() == content
    assert [path.name for path in file.parent.glob("*.dropped*")] == []


def test_an_empty_file_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "empty.aof"
    file.touch()
    assert repair(file).dropped_bytes == 0


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        repair(tmp_path / "nothing.aof")


def test_a_file_that_a_server_writes_is_not_touched(tmp_path: Path) -> None:
    server = start_redis(tmp_path, DURABLE_CONFIG)
    asyncio.run(_deposit_once(server.url))
    with pytest.raises(Conflict, match=f"process {server.process.pid} "):
        repair(tmp_path / APPEND_ONLY_FILE)
    server.stop()


async def _deposit_once(url: str) -> None:
    ledger = RedisLedger.from_url(url)
    await ledger.apply(moves.deposit(1))
    await ledger.close()


@pytest.mark.prove
def test_a_file_cut_at_any_byte_keeps_every_transfer_that_is_whole(torn: tuple[Path, list[int]]) -> None:
    file, sizes = torn
    content = file.read_bytes()
    for cut in range(sizes[0], len(content), 7):
        file.write_bytes(content[:cut])
        whole = sum(size <= cut for size in sizes)
        assert repair(file).kept_bytes == sizes[whole - 1]
        if cut % 5 == 0:
            assert deposited(file.parent) == list(range(1, whole + 1))
