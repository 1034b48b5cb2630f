"""Copies of a network's money: made while the network runs, and restored into a home without any.

A copy is a compressed tar file. Its last member says that it is whole, and from when it is.
"""

import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import ConfigDict, TypeAdapter, ValidationError

from azu.clock import wall_clock_ms
from azu.errors import Conflict, InvalidRequest, NotFound, Unavailable
from azu.files import disk_errors, replacing
from azu.launch.formats import FORMAT, check_format
from azu.launch.network_process import home_locked
from azu.launch.network_users import BESIDE_LEDGER, DEVNET_CHAIN, LEDGER
from azu.money.ledger.durability import FileRepair, append_only_files, repair

# The platform's key on a real chain is in no home: it is kept apart.
_STORE, _SEALS = LEDGER
_LAST = "backup.json"
_TRIES = 5
_BLOCK_BYTES = 1 << 20
_DAMAGED = (OSError, EOFError, tarfile.TarError, zlib.error, ValueError)


@dataclass(frozen=True, slots=True)
class Backup:
    """A whole copy: how many files and bytes it has, and from when it is. What came later is not in it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: int
    made_at_ms: int
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored, and what was cut off the end of the store's files: half a write, if anything."""

    backup: Backup
    cut: FileRepair


_BACKUP = TypeAdapter(Backup)


class _Changed(Exception):
    """The store rewrote its files, or the books sealed entries, while they were copied."""


def back_up(home: Path, archive: Path, *, now_ms: Callable[[], int] = wall_clock_ms) -> Backup:
    """Write a copy of a home's money into a new file that only its owner can read.

    Raises NotFound for a home without a ledger, Conflict for a file that exists, Unavailable where the disk
    fails or the files change again and again.
    """
    if not (home / _SEALS).is_dir():
        raise NotFound(f"there is no ledger in {home}")
    if archive.exists():
        raise Conflict(f"{archive} exists; a copy never replaces another one")
    for _ in range(_TRIES):
        made_at_ms = now_ms()
        try:
            with (
                disk_errors(archive.parent),
                replacing(archive, mode=0o600) as file,
                tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar,
            ):
                return _write(tar, home, made_at_ms)
        except _Changed:
            continue
    raise Unavailable("the ledger's files changed while they were copied; try again")


def restore(archive: Path, home: Path, network_home: Path) -> Restored:
    """Put the copy into a home that has no money, and cut half a write off the end of the store's files.

    Raises Conflict where a network runs in `network_home`, or where `home` has money already, InvalidRequest
    for a file that is no whole copy; the home has not changed then.
    """
    with home_locked(network_home):
        for name in (*LEDGER, *BESIDE_LEDGER):
            if (home / name).exists():
                raise Conflict(f"{home / name} exists; a copy is restored only where no money is")
        part = home / ".restored.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            backup = _extract(archive, part)
            cut = repair(append_only_files(part / _STORE))
            with disk_errors(home):
                _give(part, home)
                # The ledger comes last: without it there is nothing that `azu up` would start.
                for path in sorted(part.iterdir(), key=lambda path: path.name == _SEALS):
                    path.rename(home / path.name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return Restored(backup, cut)


def _write(tar: tarfile.TarFile, home: Path, made_at_ms: int) -> Backup:
    files = size = 0
    for path in _files(home):
        with _opened(path) as content:
            member = tarfile.TarInfo(str(path.relative_to(home)))
            # What is appended meanwhile comes after the copy.
            member.size, member.mode = os.fstat(content.fileno()).st_size, 0o600
            tar.addfile(member, content)
        files, size = files + 1, size + member.size
    backup = Backup(FORMAT, made_at_ms, files, size)
    text = json.dumps(asdict(backup)).encode()
    last = tarfile.TarInfo(_LAST)
    last.size = len(text)
    tar.addfile(last, io.BytesIO(text))
    return backup


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise _Changed from error


def _files(home: Path) -> Iterator[Path]:
    """Yield what belongs to the money, in an order in which no part knows of something that an earlier lacks.

    The mark of the last entry comes before the journal: books that lack a noted entry have lost it. Raises
    _Changed after the store's files if they, or the sealed entries, are others than before.
    """
    # A chain that lacks what the books have credited or paid would be a loss; more than they know is none.
    chain = home / DEVNET_CHAIN
    for name in BESIDE_LEDGER:
        path = home / name
        if path == chain:
            continue
        if path.is_file():
            yield path
        yield from sorted(one for one in path.rglob("*") if one.is_file())
    seals, store = _sealed(home), append_only_files(home / _STORE)
    mark = home / _SEALS / "head.json"
    if mark.exists():
        yield mark
    manifests = sorted(store[0].parent.glob("*.manifest"))
    yield from (*manifests, *store)
    if (_sealed(home), append_only_files(home / _STORE)) != (seals, store):
        raise _Changed
    yield from seals
    if chain.is_file():
        yield chain


def _sealed(home: Path) -> tuple[Path, ...]:
    # The index of ids is made again from these.
    return tuple(sorted((home / _SEALS).glob("[0-9]*.jsonl")))


def _extract(archive: Path, folder: Path) -> Backup:
    backup, files, size = None, 0, 0
    allowed = {*LEDGER, *BESIDE_LEDGER}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = Path(member.name)
                if backup is not None or not member.isfile() or ".." in path.parts:
                    raise ValueError(f"{member.name} does not belong there")
                content = tar.extractfile(member)
                assert content is not None, "it is a file"
                if member.name == _LAST:
                    backup = _BACKUP.validate_json(content.read(_BLOCK_BYTES))
                    continue
                if path.parts[0] not in allowed:
                    raise ValueError(f"{member.name} does not belong there")
                files, size = files + 1, size + member.size
                with disk_errors(folder.parent):
                    (folder / path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    with replacing(folder / path, mode=0o600) as file:
                        shutil.copyfileobj(content, file, _BLOCK_BYTES)
    except ValidationError as error:
        raise InvalidRequest(f"{archive} is of another version of azu") from error
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {archive}") from error
    except _DAMAGED as error:
        raise InvalidRequest(f"{archive} is no copy of azu, or damaged: {error}") from error
    if backup is None or (backup.files, backup.bytes) != (files, size):
        raise InvalidRequest(f"{archive} is not a whole copy")
    check_format(backup.format, str(archive))
    return backup


def _give(folder: Path, home: Path) -> None:
    """Make what root restored belong to the owner of the home."""
    owner = home.stat()
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)
