"""Models leave the registry's disk before it is short, the longest unused first."""

import os
from pathlib import Path

import pytest

from azu.errors import Unavailable
from azu.models.room import ModelRoom

DISK = 1_000


@pytest.fixture
def room(tmp_path: Path) -> ModelRoom:
    def free(root: Path) -> int:
        return DISK - sum(path.stat().st_size for path in root.rglob("shard"))

    return ModelRoom(tmp_path, free_bytes=100, disk_free=free)


def use(room: ModelRoom, model_id: str, at_s: int, num_bytes: int = 0) -> None:
    room.note_used(model_id)
    (file,) = (one for one in room.root.glob("*/model-id") if one.read_text() == model_id)
    os.utime(file, (at_s, at_s))
    if num_bytes:
        (file.parent / "shard").write_bytes(b"x" * num_bytes)


def kept(room: ModelRoom) -> set[str]:
    return {file.read_text() for file in room.root.glob("*/model-id")}


def test_the_longest_unused_models_leave_until_there_is_room(room: ModelRoom) -> None:
    for at_s, name in enumerate(("azu/tiny-dense", "a/one", "a/two", "/three")):
        use(room, name, at_s, 200)
    use(room, "a/one", 9)
    left: list[str] = []
    room.make(100, "a/new", left.append)
    assert left == []
    room.make(300, "a/new", left.append)
    assert left == ["a/two"]
    assert kept(room) == {"azu/tiny-dense", "a/one", "/three"}
    room.make(450, "a/new", left.append)
    assert left == ["a/two", "/three"]


def test_a_model_that_does_not_fit_is_refused_and_never_removes_itself(room: ModelRoom) -> None:
    use(room, "azu/tiny-dense", 0, 500)
    use(room, "a/new", 1, 200)
    with pytest.raises(Unavailable, match="no room") as refused:
        room.make(600, "a/new", lambda _: None)
    assert refused.value.code == "registry_full"
    assert kept(room) == {"azu/tiny-dense", "a/new"}
