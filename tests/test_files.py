import pytest

from azu.files import replacing, write_all


def test_a_file_appears_under_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        write_all(file, b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_that_was_not_finished_leaves_nothing(tmp_path):
    def fail() -> None:
        with replacing(tmp_path / "file") as file:
            write_all(file, b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_every_byte_is_written_even_when_the_file_takes_few_at_once():
    taken = bytearray()

    class Slow:
        def write(self, content: memoryview) -> int:
            taken.extend(content[:3])
            return min(3, len(content))

    write_all(Slow(), b"0123456789")
    assert taken == b"0123456789"
