"""State of a later release is refused in one sentence, before anything of it is changed."""

from pathlib import Path

import pytest
import redis

from azu.errors import ConfigurationError
from azu.launch.formats import FORMAT, claim_store, mark_lender
from azu.launch.network_process import home_locked

LATER = FORMAT + 1
REFUSAL = rf"is of a later release of azu \(format {LATER}; this one reads up to {FORMAT}\): install that"


def content(home: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}


def test_a_home_of_a_later_release_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "format.json").write_text(f"{LATER}\n")
    before = content(tmp_path)

    with pytest.raises(ConfigurationError, match=REFUSAL), home_locked(tmp_path):
        pytest.fail("it was taken")

    assert content(tmp_path) == before


@pytest.mark.parametrize("damaged", ["", "0", "true", '"1"', "[]", "1.0"])
def test_a_home_whose_format_cannot_be_read_is_refused(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "format.json").write_text(damaged)

    with pytest.raises(ConfigurationError, match=r"format\.json"), home_locked(tmp_path):
        pytest.fail("it was taken")


def test_a_home_without_a_number_is_of_the_first_format_and_gets_its_number(tmp_path: Path) -> None:
    with home_locked(tmp_path):
        assert (tmp_path / "format.json").read_text() == f"{FORMAT}\n"
    with home_locked(tmp_path):
        pass


def test_a_home_that_only_lends_gets_its_number_and_a_networks_keeps_what_it_has(tmp_path: Path) -> None:
    mark_lender(tmp_path / "lends")
    assert (tmp_path / "lends" / "format.json").read_text() == f"{FORMAT}\n"

    for kept in ("redis", "users"):
        (tmp_path / kept / kept).mkdir(parents=True)
        mark_lender(tmp_path / kept)
        assert not (tmp_path / kept / "format.json").exists(), "the next `azu up` has to carry it over"
    (tmp_path / "format.json").write_text("0\n")
    mark_lender(tmp_path)
    assert (tmp_path / "format.json").read_text() == "0\n"


@pytest.mark.parametrize("found", [str(LATER), "x"])
def test_a_store_of_a_later_release_is_refused_and_left_as_it_is(redis_url: str, found: str) -> None:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        client.set("azu:format", found)

        with pytest.raises(ConfigurationError, match=REFUSAL if found != "x" else "names no format"):
            claim_store(redis_url)

        assert client.keys() == ["azu:format"]
        assert client.get("azu:format") == found
        client.delete("azu:format")
        claim_store(redis_url)
        claim_store(redis_url)
        assert client.get("azu:format") == str(FORMAT)
