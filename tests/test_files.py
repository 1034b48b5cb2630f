"""Files are written whole or not at all, and private ones are never readable by others."""

import os
import stat

import pytest

from azu.errors import Unavailable
from azu.files import disk_errors, replacing, write_all, write_private, write_private_once


def test_a_replaced_file_keeps_its_old_content_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        write_all(file, b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_whose_block_raised_leaves_nothing(tmp_path):
    def fail() -> None:
        with replacing(tmp_path / "file") as file:
            write_all(file, b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_error_names_the_file_below_home_and_the_reason(tmp_path):
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with (
        pytest.raises(Unavailable) as refused,
        disk_errors(tmp_path),
        replacing(tmp_path / "shard", part=full) as file,
    ):
        write_all(file, b"x")
    assert refused.value.message == "shard: No space left on device"

    with pytest.raises(Unavailable, match=r"^model/shard: No such file"), disk_errors(tmp_path):
        (tmp_path / "model" / "shard").read_bytes()
    with pytest.raises(Unavailable, match=r"^shard: No such file"), disk_errors(tmp_path / "home"):
        (tmp_path / "shard").read_bytes()


def test_a_private_file_is_readable_by_its_owner_alone(tmp_path):
    for path, write in (
        (tmp_path / "a" / "b", lambda path: write_private(path, "old")),
        (tmp_path / "a" / "b", lambda path: write_private(path, "secret")),
        (tmp_path / "c", lambda path: write_private_once(path, b"secret")),
    ):
        write(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (tmp_path / "a" / "b").read_text() == (tmp_path / "c").read_text() == "secret"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700


def test_a_private_file_lies_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced, sync = tmp_path / "key", [], os.fsync

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((name, path.exists(), os.fstat(descriptor).st_size))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_private(path, "secret")

    file, folder = synced
    assert file == (str(tmp_path / ".key.part"), False, 6)
    assert folder[:2] == (str(tmp_path), True)


def test_a_file_that_is_written_once_is_never_overwritten(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    with pytest.raises(FileExistsError):
        write_private_once(path, b"new")

    assert path.read_bytes() == b"old"


def test_every_byte_is_written_when_the_file_takes_three_at_a_time():
    taken = bytearray()

    class ThreeAtATime:
        def write(self, content: memoryview) -> int:
            taken.extend(content[:3])
            return min(3, len(content))

    write_all(ThreeAtATime(), b"0123456789")
    assert taken == b"0123456789"
