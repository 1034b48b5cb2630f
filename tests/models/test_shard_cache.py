"""The cache has only verified shards, whatever other processes do."""

import hashlib
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from azu.errors import ShardError
from azu.models.shard_cache import ShardCache, within

CONTENT = os.urandom(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()


def chunks(content: bytes = CONTENT, size: int = 65536) -> list[bytes]:
    return [content[start : start + size] for start in range(0, len(content), size)]


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache")


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_a_stored_shard_is_found_by_its_sha256(cache, tmp_path):
    assert cache.path(SHA256) is None
    path = cache.store(SHA256, len(CONTENT), chunks())
    assert path.read_bytes() == CONTENT
    assert cache.path(SHA256) == path
    assert cache.contents() == {SHA256}
    assert ShardCache(tmp_path / "cache").path(SHA256) == path


def test_a_shard_in_the_cache_is_not_fetched_again(cache):
    path = cache.store(SHA256, len(CONTENT), chunks())
    assert cache.store(SHA256, len(CONTENT), iter(lambda: pytest.fail("fetched"), None)) == path


@pytest.mark.parametrize(
    "wrong",
    [CONTENT[:-1], CONTENT + b"\0", b"\0" + CONTENT[1:], b""],
    ids=["short", "long", "changed", "empty"],
)
def test_wrong_bytes_are_refused_and_not_kept(cache, tmp_path, wrong):
    with pytest.raises(ShardError, match=SHA256):
        cache.store(SHA256, len(CONTENT), chunks(wrong))
    assert files(tmp_path) == []
    assert cache.contents() == frozenset()


def test_a_sender_that_never_ends_is_interrupted(cache, tmp_path):
    sent = 0

    def endless():
        nonlocal sent
        while True:
            sent += 1
            yield b"x" * 1000

    with pytest.raises(ShardError, match="longer"):
        cache.store(SHA256, 5000, endless())
    assert sent == 6
    assert files(tmp_path) == []


def test_an_interrupted_fetch_leaves_no_file(cache, tmp_path):
    def breaking():
        yield CONTENT[:1000]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        cache.store(SHA256, len(CONTENT), breaking())
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["", "..", "../" + SHA256, SHA256.upper(), SHA256[:-1], SHA256 + "\n", "/" + SHA256]
)
def test_only_a_sha256_identifies_a_shard(cache, name):
    for call in (
        cache.path,
        lambda name: cache.store(name, 1, [b"x"]),
        lambda name: cache.adopt(name, Path("x")),
    ):
        with pytest.raises(ShardError):
            call(name)


def test_an_adopted_file_is_used_in_place(cache, tmp_path):
    shard = tmp_path / "shard.safetensors"
    shard.write_bytes(CONTENT)
    assert cache.adopt(SHA256, shard) == shard
    assert cache.path(SHA256) == shard
    assert cache.contents() == {SHA256}


def test_a_file_is_verified_when_it_is_adopted(cache, tmp_path):
    shard = tmp_path / "shard.safetensors"
    shard.write_bytes(CONTENT)
    with pytest.raises(ShardError, match=r"shard\.safetensors"):
        cache.adopt(OTHER, shard)
    assert files(tmp_path) == []


def wait_for_a_later_change_time(folder: Path) -> None:
    """Return when files get a later change time than before: a file system advances it in steps."""
    probe = folder / "probe"
    probe.touch()
    first_ns = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == first_ns:
        probe.touch()


@pytest.mark.parametrize("keep_times", [False, True])
def test_an_adopted_file_that_changed_is_no_longer_in_the_cache(cache, tmp_path, keep_times):
    shard = tmp_path / "shard.safetensors"
    shard.write_bytes(CONTENT)
    cache.adopt(SHA256, shard)
    before = shard.stat()
    wait_for_a_later_change_time(tmp_path)
    shard.write_bytes(b"\0" * len(CONTENT))
    if keep_times:
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.path(SHA256) is None
    assert cache.contents() == frozenset()
    with pytest.raises(ShardError):
        cache.adopt(SHA256, shard)
    shard.write_bytes(CONTENT)
    wait_for_a_later_change_time(tmp_path)
    assert cache.adopt(SHA256, shard) == shard
    assert cache.path(SHA256) == shard


def test_an_adopted_file_that_was_deleted_can_be_stored(cache, tmp_path):
    shard = tmp_path / "shard.safetensors"
    shard.write_bytes(CONTENT)
    cache.adopt(SHA256, shard)
    shard.unlink()
    assert cache.path(SHA256) is None
    assert cache.contents() == frozenset()
    path = cache.store(SHA256, len(CONTENT), chunks())
    assert path.parent == tmp_path / "cache"
    assert not path.is_symlink()


def test_many_writers_of_one_shard_do_not_disturb_each_other(tmp_path):
    barrier = threading.Barrier(8)

    def write(_: int) -> bytes:
        cache = ShardCache(tmp_path / "cache")
        barrier.wait(10)
        return cache.store(SHA256, len(CONTENT), chunks()).read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(write, range(8))) == {CONTENT}
    assert files(tmp_path) == [f"{SHA256}.safetensors"]


_KILLED_WHILE_STORING = """
import sys, time
from pathlib import Path
from azu.models.shard_cache import ShardCache
def chunks():
    yield b"x" * 1000
    print("written", flush=True)
    time.sleep(60)
ShardCache(Path(sys.argv[1])).store("0" * 64, 2000, chunks())
"""


def test_a_part_of_a_killed_process_is_no_shard_and_is_removed_later(tmp_path):
    root = tmp_path / "cache"
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED_WHILE_STORING, root], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    (part,) = root.iterdir()
    assert ShardCache(root).contents() == frozenset()
    assert part.exists()  # its writer may be alive
    hour_ago = time.time() - 7200
    os.utime(part, (hour_ago, hour_ago))
    ShardCache(root)
    assert files(tmp_path) == []


def test_a_full_disk_makes_room_by_the_shards_that_were_used_least_recently(tmp_path):
    room = 4 * len(CONTENT)
    folder = tmp_path / "cache"

    def free_bytes(_: Path) -> int:
        return room - sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    cache = ShardCache(folder, free_bytes)
    shards = [bytes([number]) * len(CONTENT) for number in range(6)]
    ids = [hashlib.sha256(shard).hexdigest() for shard in shards]
    paths = []
    for number in range(4):
        paths.append(cache.store(ids[number], len(CONTENT), [shards[number]]))
        os.utime(paths[-1], (number, number))
    assert cache.path(ids[0]) is not None  # the second is the oldest now
    with paths[2].open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for number in (4, 5):
            cache.store(ids[number], len(CONTENT), [shards[number]])
        assert mapped[:1] == shards[2][:1]

    assert cache.contents() == {ids[0], ids[2], ids[4], ids[5]}


def test_shards_take_no_more_of_the_disk_than_their_owner_allows(tmp_path):
    cache = ShardCache(tmp_path / "cache", within(2 * len(CONTENT)))
    shards = [bytes([number]) * len(CONTENT) for number in range(4)]
    ids = [hashlib.sha256(shard).hexdigest() for shard in shards]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(shards[3])
    cache.adopt(ids[3], elsewhere)
    for number in range(3):
        os.utime(cache.store(ids[number], len(CONTENT), [shards[number]]), (number, number))

    assert cache.contents() == {ids[1], ids[2], ids[3]}, "a link takes nothing"
