"""Where `azu prompt` takes its question from."""

from pathlib import Path

import pytest

from azu.cli.prompt import _asked
from azu.errors import ConfigurationError, InvalidRequest
from tests.cli.test_main import azu
from tests.client.ingress import running_ingress


def test_a_question_is_read_from_a_file_without_the_end_of_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "question").write_text("What is\n the capital?\n")

    assert _asked(None, tmp_path / "question") == "What is\n the capital?"
    assert _asked("--as it is\n", None) == "--as it is\n"


@pytest.mark.parametrize(("text", "file"), [(None, None), ("hello", "question")])
def test_a_question_has_one_source(text: str | None, file: str | None) -> None:
    with pytest.raises(InvalidRequest, match="either the text"):
        _asked(text, None if file is None else Path(file))


def test_a_file_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff")

    with pytest.raises(ConfigurationError, match=r"picture is damaged: it is not UTF-8"):
        _asked(None, tmp_path / "picture")
    with pytest.raises(ConfigurationError, match=r"nothing cannot be read: No such file"):
        _asked(None, tmp_path / "nothing")


def test_a_question_is_read_from_standard_input(tmp_path: Path) -> None:
    with running_ingress() as ingress:
        azu("prompt", "-", home=tmp_path, given="What is\n东京?\n", AZU_URL=ingress.url, AZU_API_KEY="k")

    (request,) = ingress.requests
    assert request.body["messages"] == [{"role": "user", "content": "What is\n东京?"}]
