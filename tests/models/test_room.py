"""Models leave the registry's disk before it is short, the longest unused first."""

import os
from pathlib import Path

import pytest

from azu.errors import Unavailable
from azu.models.room import ModelRoom

DISK = 1_000
COMMIT = "c" * 40


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

    def make(num_bytes: int) -> None:
        room.make(num_bytes, ("a/new", COMMIT), set(), lambda name, _: left.append(name))

    make(100)
    assert left == []
    make(300)
    assert left == ["a/two"]
    assert kept(room) == {"azu/tiny-dense", "a/one", "/three"}
    make(450)
    assert left == ["a/two", "/three"]


def test_a_model_that_does_not_fit_is_refused_and_never_removes_itself(room: ModelRoom) -> None:
    use(room, "azu/tiny-dense", 0, 500)
    use(room, "a/new", 1, 200)
    with pytest.raises(Unavailable, match="no room") as refused:
        room.make(600, ("a/new", COMMIT), set(), lambda *_: None)
    assert refused.value.code == "registry_full"
    assert kept(room) == {"azu/tiny-dense", "a/new"}


def test_a_model_that_cannot_fit_removes_no_other(room: ModelRoom) -> None:
    for at_s, name in enumerate(("a/one", "a/two")):
        use(room, name, at_s, 200)
    with pytest.raises(Unavailable, match="no room"):
        room.make(950, ("a/new", COMMIT), set(), lambda *_: None)
    with pytest.raises(Unavailable, match="no room"):
        room.make(800, ("a/new", COMMIT), {("a/one", COMMIT)}, lambda *_: None)
    assert kept(room) == {"a/one", "a/two"}
    room.make(700, ("a/new", COMMIT), {("a/one", COMMIT)}, lambda *_: None)
    assert kept(room) == {"a/one"}, "the other one is in use"


def test_older_revisions_of_a_model_leave_first_but_for_those_in_use(room: ModelRoom) -> None:
    use(room, "a/other", 0, 100)
    use(room, "a/one", 1)
    folder = next(one.parent for one in room.root.glob("*/model-id") if one.read_text() == "a/one")
    for revision in ("1" * 40, "2" * 40, COMMIT):
        (folder / revision).mkdir()
        (folder / revision / "shard").write_bytes(b"x" * 200)
    left: list[tuple[str, str]] = []
    room.make(300, ("a/one", COMMIT), {("a/one", "1" * 40)}, lambda *one: left.append(one))
    assert left == [("a/one", "2" * 40)]
    assert {one.name for one in folder.glob("*/")} == {"1" * 40, COMMIT}
