"""An acknowledged transfer survives the death of the server, at any moment and under load."""

import asyncio
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import redis

from azu.errors import Conflict, InsufficientBalance, LedgerError, NotFound, Unavailable
from azu.money.ledger.durability import (
    APPEND_ONLY_FILE,
    DURABLE_CONFIG,
    FileRepair,
    FileTail,
    append_only_files,
    read,
    repair,
    torn_file,
)
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.transfers import Deposit, Transfer, user_available
from azu.redis_client import connect_redis
from tests.builders import ALICE, BOB
from tests.money.ledger import moves
from tests.money.ledger.books import apply_each, open_books, with_books
from tests.redis_server import OLDER_SERVER, RedisDidNotStart, RunningRedis, start_redis

CLIENTS = 8
KILLS = 20


class Client:
    """Sends jobs one after the other, each transfer again until it is acknowledged or its round ends."""

    def __init__(self, name: int, seed: int) -> None:
        self.name = name
        self.random = random.Random(f"{seed}-{name}")
        self.jobs = 0
        self.unsure: list[Transfer] = []
        self.acknowledged: list[Transfer] = []

    def next_transfers(self) -> list[Transfer]:
        self.jobs += 1
        job = f"{self.name}-{self.jobs}"
        address, reserved = self.random.choice([ALICE, BOB]), self.random.randrange(1, 50)
        charged = self.random.randrange(reserved + 1)
        ends: list[Transfer] = [moves.settle(job, charged, w0=charged // 2), moves.release(job)]
        return [
            moves.deposit(60, address=address, tx_hash=f"0x{job}"),
            moves.reserve(job, reserved, address=address),
            self.random.choice(ends),
        ]

    async def work(self, ledger: Ledger) -> None:
        """Work until Redis dies."""
        try:
            while True:
                self.unsure = self.unsure or self.next_transfers()
                while self.unsure:
                    await ledger.apply(self.unsure[0])
                    self.acknowledged.append(self.unsure.pop(0))
        except Unavailable:
            return


async def round_of_work(server: RunningRedis, folder: Path, clients: list[Client], seconds: float) -> None:
    async with open_books(server.url, folder) as ledger:
        await apply_each(ledger, *map(moves.open_key, (ALICE, BOB)))
        work = [asyncio.create_task(one.work(ledger)) for one in clients]
        await asyncio.sleep(seconds)
        server.kill()
        await asyncio.gather(*work)


async def check(server: RunningRedis, folder: Path, clients: list[Client]) -> None:
    async with open_books(server.url, folder) as ledger:
        report = await ledger.audit()
        assert report.agrees, report.findings
        assert ledger.lost == 0
        kept = {entry.transfer.id: entry.transfer async for entry in ledger.journal()}
    for one in clients:
        for transfer in one.acknowledged:
            assert kept.pop(transfer.id) == transfer
    # The other entries are of transfers whose answer was lost.
    others = {one for one in kept if not one.startswith(("writer:", "key:"))}
    assert others <= {one.unsure[0].id for one in clients if one.unsure}


@pytest.mark.prove
def test_a_killed_server_loses_no_acknowledged_transfer(tmp_path: Path, figures: Counter[str]) -> None:
    seed = int(os.environ.get("AZU_TEST_SEED", "1"))
    pause = random.Random(seed)
    clients = [Client(name, seed) for name in range(CLIENTS)]
    folder = tmp_path / "ledger"
    server = start_redis(tmp_path, DURABLE_CONFIG)
    for _ in range(KILLS):
        asyncio.run(round_of_work(server, folder, clients, pause.uniform(0.05, 0.6)))
        server = start_redis(tmp_path, DURABLE_CONFIG, port=server.port)
        asyncio.run(check(server, folder, clients))
    server.stop()
    acknowledged = sum(len(one.acknowledged) for one in clients)
    assert acknowledged > 10 * KILLS
    figures["times Redis was killed under load"] += KILLS
    figures["transfers acknowledged meanwhile, of which none was lost"] += acknowledged


def test_a_transfer_is_on_disk_before_it_is_acknowledged(tmp_path: Path) -> None:
    async def scenario(ledger: Ledger) -> None:
        file = append_only_files(tmp_path)[-1]
        await apply_each(ledger, moves.open_key(), moves.deposit(5))
        assert b"deposit:0x01" in file.read_bytes()
        with pytest.raises(InsufficientBalance):
            await ledger.apply(moves.reserve("job-1", 6))
        assert b"reserve:job-1" not in file.read_bytes()

    server = start_redis(tmp_path, DURABLE_CONFIG)
    with_books(server.url, tmp_path / "ledger", scenario)
    server.stop()


def test_a_ledger_works_again_after_its_server_restarted(tmp_path: Path) -> None:
    async def scenario(first: RunningRedis) -> RunningRedis:
        async with open_books(first.url, tmp_path / "ledger") as ledger:
            await apply_each(ledger, moves.open_key(), moves.deposit(5))
            first.kill()
            with pytest.raises(Unavailable):
                await ledger.apply(moves.reserve("job-1", 5))
            second = start_redis(tmp_path, DURABLE_CONFIG, port=first.port)
            assert (await ledger.apply(moves.deposit(5))).repeated
            assert not (await ledger.apply(moves.reserve("job-1", 5))).repeated
        return second

    asyncio.run(scenario(start_redis(tmp_path, DURABLE_CONFIG))).stop()


def test_a_redis_without_memory_writes_no_part_of_a_transfer(tmp_path: Path) -> None:
    async def scenario(ledger: Ledger) -> None:
        redis = connect_redis(server.url)
        await apply_each(ledger, moves.open_key(), moves.deposit(5))
        await redis.config_set("maxmemory", "1")
        with pytest.raises(Unavailable, match="maxmemory"):
            await ledger.apply(moves.reserve("job-1", 1))
        await redis.config_set("maxmemory", "0")
        assert (await ledger.audit()).agrees
        assert not (await ledger.apply(moves.reserve("job-1", 1))).repeated
        await redis.aclose()

    server = start_redis(tmp_path, DURABLE_CONFIG)
    with_books(server.url, tmp_path / "ledger", scenario)
    server.stop()


def command(*arguments: bytes) -> bytes:
    return b"*%d\r\n" % len(arguments) + b"".join(b"$%d\r\n%b\r\n" % (len(one), one) for one in arguments)


SELECT = command(b"SELECT", b"0")
TRANSFER = command(b"MULTI") + command(b"XADD", b"j", b"1-0", b"a\r\n", b"") + command(b"EXEC")
PLAIN = command(b"SET", b"job", b"x" * 300)
PARTS = [SELECT, TRANSFER, PLAIN, TRANSFER]
FILE = b"".join(PARTS)
ENDS = [sum(len(part) for part in PARTS[:count]) for count in range(len(PARTS) + 1)]


def test_a_whole_file_is_kept_to_its_end() -> None:
    assert read(FILE) == FileTail(len(FILE), ())
    assert read(b"") == FileTail(0, ())


def test_a_file_cut_anywhere_is_kept_up_to_its_last_whole_transfer() -> None:
    for cut in range(len(FILE)):
        assert read(FILE[:cut]).whole_bytes == max(end for end in ENDS if end <= cut)


def test_whole_commands_of_an_unfinished_transfer_are_listed() -> None:
    torn = SELECT + TRANSFER[: -len(command(b"EXEC"))] + b"*1\r\n$4\r\nEX"
    assert read(torn) == FileTail(len(SELECT), ((b"MULTI",), (b"XADD", b"j", b"1-0", b"a\r\n", b"")))


def test_a_changed_byte_before_the_last_transfer_never_drops_a_transfer() -> None:
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
def test_bytes_that_are_no_command_are_refused(rubbish: bytes) -> None:
    with pytest.raises(LedgerError, match="begins neither"):
        read(SELECT + rubbish)


def test_a_file_that_begins_with_a_snapshot_is_refused() -> None:
    with pytest.raises(LedgerError, match="redis-check-aof"):
        read(b"REDIS0009" + FILE)


def test_an_empty_command_is_refused() -> None:
    with pytest.raises(LedgerError, match="empty"):
        read(SELECT + b"*0\r\n" + FILE)


TRANSFERS = 8


def folder_of(file: Path) -> Path:
    """Return the store's folder, in which the folder of its append-only files is."""
    return file.parent.parent


def mended(file: Path) -> FileRepair:
    return repair(append_only_files(folder_of(file)))


@pytest.fixture
def torn(tmp_path: Path) -> tuple[Path, list[int]]:
    """A durable file of some deposits; the list holds its size after each of them."""
    sizes: list[int] = []
    server = start_redis(tmp_path, DURABLE_CONFIG)
    file = append_only_files(tmp_path)[-1]

    async def deposits(ledger: Ledger) -> None:
        for number in range(1, TRANSFERS + 1):
            await ledger.apply(moves.deposit(number, tx_hash=f"0x{number}"))
            sizes.append(file.stat().st_size)

    with_books(server.url, tmp_path / "ledger", deposits)
    server.kill()
    return file, sizes


def deposited(folder: Path) -> list[int]:
    """Start Redis on the file, audit it, and return the amounts that were credited."""
    amounts: list[int] = []

    async def look(ledger: Ledger) -> None:
        report = await ledger.audit()
        assert report.agrees, report.findings
        booked = [entry.transfer async for entry in ledger.journal()]
        amounts.extend(one.lamports for one in booked if isinstance(one, Deposit))
        assert ledger.state.balance(user_available(ALICE)) == sum(amounts)
        again = await ledger.apply(moves.deposit(TRANSFERS, tx_hash=f"0x{TRANSFERS}"))
        assert again.repeated == (TRANSFERS in amounts)

    server = start_redis(folder, DURABLE_CONFIG)
    # Whether entries are missing is not the question: these books do not know the folder of those before.
    with tempfile.TemporaryDirectory() as seals:
        with_books(server.url, Path(seals), look)
    server.stop()
    return amounts


@pytest.mark.parametrize(("behind", "more"), [(b"XADD", 30), (b"XADD", 2), (b"$", 3), (b"*", 1)])
def test_a_torn_tail_is_refused_then_repaired(torn: tuple[Path, list[int]], behind: bytes, more: int) -> None:
    file, sizes = torn
    content = file.read_bytes()
    cut = content.index(behind, sizes[-2]) + more
    file.write_bytes(content[:cut])
    with pytest.raises(RedisDidNotStart, match="Unexpected end of file"):
        start_redis(folder_of(file), DURABLE_CONFIG)

    done = mended(file)

    assert done.kept_bytes == file.stat().st_size == sizes[-2]
    assert done.dropped_bytes == cut - sizes[-2]
    assert done.saved_to is not None
    assert Path(done.saved_to).read_bytes() == content[sizes[-2] : cut]
    assert Path(done.saved_to).stat().st_mode & 0o777 == 0o600
    assert deposited(folder_of(file)) == list(range(1, TRANSFERS))


def test_a_whole_file_is_not_changed(torn: tuple[Path, list[int]]) -> None:
    file, sizes = torn
    content = file.read_bytes()
    done = mended(file)
    assert (done.dropped_bytes, done.saved_to, done.kept_bytes) == (0, None, sizes[-1])
    assert file.read_bytes() == content
    assert deposited(folder_of(file)) == list(range(1, TRANSFERS + 1))


def test_zeros_after_a_power_cut_are_cut_off(torn: tuple[Path, list[int]]) -> None:
    file, sizes = torn
    content = file.read_bytes()
    file.write_bytes(content[: sizes[-2] + 30] + bytes(200_000))
    assert mended(file).kept_bytes == sizes[-2]
    assert deposited(folder_of(file)) == list(range(1, TRANSFERS))


def test_a_second_repair_of_the_same_tail_keeps_both_tails(torn: tuple[Path, list[int]]) -> None:
    file, _ = torn
    content = file.read_bytes()
    tails = []
    for cut in (len(content) - 3, len(content) - 7):
        file.write_bytes(content[:cut])
        tails.append(mended(file).saved_to)
    assert len(set(tails)) == 2
    assert all(tail is not None and Path(tail).exists() for tail in tails)


def test_damage_before_the_end_is_refused_and_changes_nothing(torn: tuple[Path, list[int]]) -> None:
    file, sizes = torn
    content = bytearray(file.read_bytes())
    content[sizes[2] + 1] = ord("9")
    file.write_bytes(content)
    with pytest.raises(LedgerError, match=APPEND_ONLY_FILE):
        mended(file)
    assert file.read_bytes() == content
    assert [path.name for path in file.parent.glob("*.dropped*")] == []


def test_an_empty_file_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "empty.aof"
    file.touch()
    assert repair([file]).dropped_bytes == 0


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        repair([tmp_path / "nothing.aof"])


def test_a_file_in_use_by_a_server_is_not_changed(tmp_path: Path) -> None:
    server = start_redis(tmp_path, DURABLE_CONFIG)
    asyncio.run(_deposit_once(server.url, tmp_path / "ledger"))
    with pytest.raises(Conflict, match=f"process {server.process.pid} "):
        repair(append_only_files(tmp_path))
    server.stop()


async def _deposit_once(url: str, folder: Path) -> None:
    async with open_books(url, folder) as ledger:
        await ledger.apply(moves.deposit(1))


def rewrite(url: str) -> None:
    """Have the server write its files anew: what it holds becomes the base of what comes."""
    with redis.Redis.from_url(url) as client:
        client.bgrewriteaof()
        while client.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.01)


def split(folder: Path, more: int) -> tuple[Path, Path]:
    """Return the base of all deposits but the last `more`, and the increment that has these."""

    async def deposits(ledger: Ledger) -> None:
        for number in range(1, TRANSFERS + 1):
            if number == TRANSFERS + 1 - more:
                rewrite(server.url)
            await ledger.apply(moves.deposit(number, tx_hash=f"0x{number}"))
        if not more:
            rewrite(server.url)

    server = start_redis(folder, DURABLE_CONFIG)
    with_books(server.url, folder / "ledger", deposits)
    server.kill()
    base, increment = append_only_files(folder)
    assert b"deposit:0x1" in base.read_bytes()
    return base, increment


def test_a_torn_increment_after_a_rewrite_is_repaired(tmp_path: Path) -> None:
    base, increment = split(tmp_path, 2)
    whole = base.read_bytes()
    increment.write_bytes(increment.read_bytes()[:-3])
    with pytest.raises(RedisDidNotStart, match="Unexpected end of file"):
        start_redis(tmp_path, DURABLE_CONFIG)

    assert mended(increment).file == str(increment)

    assert base.read_bytes() == whole
    assert deposited(tmp_path) == list(range(1, TRANSFERS))


def test_a_torn_base_is_repaired_only_if_nothing_came_after_it(tmp_path: Path) -> None:
    base, increment = split(tmp_path / "later", 2)
    base.write_bytes(base.read_bytes()[:-3])
    with pytest.raises(LedgerError, match="is torn, and"):
        mended(increment)
    base, increment = split(tmp_path / "nothing", 0)
    increment.write_bytes(b"")
    content = base.read_bytes()
    base.write_bytes(content[:-3])

    done = mended(increment)

    assert done.file == str(base)
    assert base.read_bytes() == content[: done.kept_bytes]
    assert torn_file(append_only_files(tmp_path / "nothing")) is None


def test_files_of_redis_6_are_taken_over(tmp_path: Path) -> None:
    older = start_redis(tmp_path, DURABLE_CONFIG, server=OLDER_SERVER)

    async def deposits(ledger: Ledger) -> None:
        for number in range(1, TRANSFERS + 1):
            await ledger.apply(moves.deposit(number, tx_hash=f"0x{number}"))

    with_books(older.url, tmp_path / "ledger", deposits)
    assert append_only_files(tmp_path) == (tmp_path / APPEND_ONLY_FILE,)
    older.kill()

    assert deposited(tmp_path) == list(range(1, TRANSFERS + 1))

    base, increment = append_only_files(tmp_path)
    assert b"deposit:0x1" in base.read_bytes()
    assert b"writer:" in increment.read_bytes()


@pytest.mark.parametrize("is_taken_over", [False, True])
@pytest.mark.parametrize("more", [0, 8])
def test_a_torn_file_of_redis_6_is_repaired(tmp_path: Path, more: int, is_taken_over: bool) -> None:
    older = start_redis(tmp_path, DURABLE_CONFIG, server=OLDER_SERVER)

    async def deposits(ledger: Ledger) -> None:
        for number in range(1, TRANSFERS + 1):
            await ledger.apply(moves.deposit(number, tx_hash=f"0x{number}"))

    with_books(older.url, tmp_path / "ledger", deposits)
    older.kill()
    file = tmp_path / APPEND_ONLY_FILE
    content = file.read_bytes()
    file.write_bytes(content[: content.rindex(b"*1\r\n$4\r\nEXEC") + more])
    if is_taken_over:
        with pytest.raises(RedisDidNotStart, match="Unexpected end of file"):
            start_redis(tmp_path, DURABLE_CONFIG)

    assert repair(append_only_files(tmp_path)).dropped_transfers == (f"deposit:0x{TRANSFERS}",)

    assert deposited(tmp_path) == list(range(1, TRANSFERS))


def test_a_manifest_that_names_no_file_is_refused(tmp_path: Path) -> None:
    manifest = tmp_path / "appendonlydir" / f"{APPEND_ONLY_FILE}.manifest"
    manifest.parent.mkdir()
    manifest.write_text("file appendonly.aof.1.base.aof seq 1 type h\n")
    with pytest.raises(LedgerError, match="names no file"):
        append_only_files(tmp_path)


@pytest.mark.prove
def test_a_file_cut_at_any_byte_keeps_every_whole_transfer(torn: tuple[Path, list[int]]) -> None:
    file, sizes = torn
    content = file.read_bytes()
    for cut in range(sizes[0], len(content), 7):
        file.write_bytes(content[:cut])
        whole = sum(size <= cut for size in sizes)
        assert mended(file).kept_bytes == sizes[whole - 1]
        if cut % 5 == 0:
            assert deposited(folder_of(file)) == list(range(1, whole + 1))
