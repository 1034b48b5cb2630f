"""A copy of a network's money, made while it is written, gives books that agree in a home without any."""

import asyncio
import io
import os
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest
import redis

from azu.errors import ConfigurationError, Conflict, InvalidRequest, NotFound
from azu.launch import backup
from azu.launch.backup import back_up, restore
from azu.launch.formats import FORMAT
from azu.launch.network_process import home_locked
from azu.money.ledger.durability import DURABLE_CONFIG, append_only_files
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.transfers import Deposit
from tests.money.ledger import moves
from tests.money.ledger.books import open_books
from tests.redis_server import start_redis


async def deposits(ledger: Ledger, first: int, count: int) -> None:
    for number in range(first, first + count):
        await ledger.apply(moves.deposit(1, tx_hash=f"0x{number}"))


async def credited(home: Path) -> int:
    """Start the store of a home, audit its books, and return how many deposits they have."""
    server = start_redis(home / "redis", DURABLE_CONFIG)
    try:
        async with open_books(server.url, home / "ledger") as ledger:
            report = await ledger.audit()
            assert report.agrees, report.findings
            assert ledger.lost == 0
            return len([entry async for entry in ledger.journal() if isinstance(entry.transfer, Deposit)])
    finally:
        server.stop()


def copied(home: Path, tmp_path: Path) -> Path:
    """Return a file with the copy of a home that has three deposits."""

    async def scenario() -> None:
        server = start_redis(home / "redis", DURABLE_CONFIG)
        async with open_books(server.url, home / "ledger") as ledger:
            await deposits(ledger, 1, 3)
        server.stop()

    asyncio.run(scenario())
    (home / "signer.json").write_text("{}")
    (home / "books").mkdir()
    (home / "books" / "authority.key").write_text("key")
    back_up(home, tmp_path / "copy")
    return tmp_path / "copy"


def test_copies_made_while_books_write_seal_and_the_store_rewrites_have_all_that_was_answered(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"

    async def scenario() -> list[int]:
        answered = []
        server = start_redis(home / "redis", DURABLE_CONFIG)
        async with open_books(server.url, home / "ledger") as ledger:
            await deposits(ledger, 0, 50)
            writing = asyncio.create_task(deposits(ledger, 50, 100_000))
            for number in range(6):
                with redis.Redis.from_url(server.url) as client, suppress(redis.ResponseError):
                    client.bgrewriteaof()  # refused while the one before still runs
                sealing = asyncio.create_task(ledger.seal()) if number % 2 else None
                answered.append(ledger.head.number)
                await asyncio.to_thread(back_up, home, tmp_path / f"copy-{number}")
                if sealing is not None:
                    await sealing
            writing.cancel()
        server.kill()
        return answered

    for number, answered in enumerate(asyncio.run(scenario())):
        bare = tmp_path / f"bare-{number}"

        restore(tmp_path / f"copy-{number}", bare, bare)

        # Beside the deposits there are entries of the writer and of seals.
        assert asyncio.run(credited(bare)) >= answered - 8


def test_the_devnets_chain_is_the_last_file_of_a_copy(tmp_path: Path) -> None:
    copied(tmp_path / "home", tmp_path)
    (tmp_path / "home" / "devnet.jsonl").write_text("{}\n")
    back_up(tmp_path / "home", tmp_path / "second")
    with tarfile.open(tmp_path / "second") as tar:
        assert tar.getnames()[-2:] == ["devnet.jsonl", "backup.json"], (
            "it may lack nothing that the books have"
        )


@pytest.mark.parametrize("happens", ["write and note", "seal"])
def test_what_happens_between_two_files_of_a_copy_loses_nothing(
    happens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, bare = tmp_path / "home", tmp_path / "bare"
    opened, seals = backup._opened, iter([True])

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server = start_redis(home / "redis", DURABLE_CONFIG)
        async with open_books(server.url, home / "ledger") as ledger:
            await deposits(ledger, 0, 3)

            async def act(path: Path) -> None:
                if happens == "seal" and path.suffix == ".aof" and next(seals, False):
                    await ledger.seal()
                elif happens != "seal":
                    await ledger.apply(moves.deposit(1, tx_hash=f"0x{path.name}"))
                    await ledger.verify()

            def opened_later(path: Path) -> BinaryIO:
                asyncio.run_coroutine_threadsafe(act(path), loop).result(60)
                return opened(path)

            monkeypatch.setattr(backup, "_opened", opened_later)
            await asyncio.to_thread(back_up, home, tmp_path / "copy")
        server.stop()

    asyncio.run(scenario())

    restore(tmp_path / "copy", bare, bare)

    assert asyncio.run(credited(bare)) >= 3


def test_a_copy_of_half_a_write_loses_only_that(tmp_path: Path) -> None:
    home, bare = tmp_path / "home", tmp_path / "bare"
    copied(home, tmp_path)
    torn = append_only_files(home / "redis")[-1]
    torn.write_bytes(torn.read_bytes()[:-3])
    back_up(home, tmp_path / "torn")

    done = restore(tmp_path / "torn", bare, bare)

    assert done.cut.dropped_bytes > 0
    # Here the write had been noted before it was torn; during a copy it is not.
    (bare / "ledger" / "head.json").unlink()
    assert asyncio.run(credited(bare)) == 2


def test_a_restored_home_has_what_decides_who_signs_and_who_may_join(tmp_path: Path) -> None:
    copy, bare = copied(tmp_path / "home", tmp_path), tmp_path / "bare"
    assert copy.stat().st_mode & 0o777 == 0o600

    done = restore(copy, bare, bare)

    assert done.cut.dropped_bytes == 0
    assert (bare / "signer.json").read_text() == "{}"
    assert (bare / "books" / "authority.key").read_text() == "key"
    restored = [path for path in bare.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert {path.stat().st_mode & 0o777 for path in restored} == {0o600}
    assert asyncio.run(credited(bare)) == 3


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def changed(content: bytes) -> bytes:
    return content[:300] + bytes([content[300] ^ 1]) + content[301:]


def archive_of(name: str) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    return made.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        changed,
        lambda _: b"",
        lambda _: b"no archive",
        lambda _: archive_of("../outside"),
        lambda _: archive_of("ledger/../../outside"),
        lambda _: archive_of("/outside"),
        lambda _: archive_of("wallet.json"),
        lambda _: archive_of("ledger/head.json"),
    ],
)
def test_a_file_that_is_no_whole_copy_is_refused_and_changes_nothing(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    copy, bare = copied(tmp_path / "home", tmp_path), tmp_path / "bare"
    copy.write_bytes(damage(copy.read_bytes()))

    with pytest.raises(InvalidRequest, match="copy"):
        restore(copy, bare, bare)

    assert {path.name for path in bare.iterdir()} <= {"network.lock", "format.json"}
    assert not (tmp_path / "outside").exists()


def test_a_copy_of_a_later_release_is_not_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(backup, "FORMAT", FORMAT + 1)
        copy = copied(tmp_path / "home", tmp_path)

    with pytest.raises(ConfigurationError, match="of a later release of azu"):
        restore(copy, tmp_path / "bare", tmp_path / "bare")

    assert not (tmp_path / "bare" / "ledger").exists()


def test_a_copy_replaces_no_money_and_no_other_copy(tmp_path: Path) -> None:
    home = tmp_path / "home"
    copy = copied(home, tmp_path)

    with pytest.raises(Conflict, match="where no money is"):
        restore(copy, home, home)
    with pytest.raises(Conflict, match="never replaces"):
        back_up(home, copy)
    with pytest.raises(NotFound, match="no ledger"):
        back_up(tmp_path, tmp_path / "other")
    with pytest.raises(NotFound, match="no file"):
        restore(tmp_path / "nothing", tmp_path / "bare", tmp_path / "bare")


def test_nothing_is_restored_where_a_network_runs(tmp_path: Path) -> None:
    copy, bare = copied(tmp_path / "home", tmp_path), tmp_path / "bare"

    with home_locked(bare), pytest.raises(Conflict, match="already runs"):
        restore(copy, bare, bare)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of others")
def test_what_root_restores_belongs_to_the_owner_of_the_home(tmp_path: Path) -> None:
    copy, bare = copied(tmp_path / "home", tmp_path), tmp_path / "bare"
    bare.mkdir()
    os.chown(bare, 12345, 12345)

    restore(copy, bare, tmp_path / "network")

    assert {path.stat().st_uid for path in bare.rglob("*")} == {12345}
