"""Where `azu prompt` takes its question from."""

import json
from pathlib import Path

import pytest

from azu.api.openai import ChatChunk
from azu.cli.prompt import asked
from azu.errors import ConfigurationError, InvalidRequest
from tests.cli.test_main import azu
from tests.client.answers import delta, last_chunk
from tests.client.ingress import Comment, Reply, running_ingress


def test_a_question_is_read_from_a_file_without_the_end_of_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "question").write_text("What is\n the capital?\n")

    assert asked(None, tmp_path / "question") == "What is\n the capital?"
    assert asked("--as it is\n", None) == "--as it is\n"


@pytest.mark.parametrize(("text", "file"), [(None, None), ("hello", "question")])
def test_a_question_has_one_source(text: str | None, file: str | None) -> None:
    with pytest.raises(InvalidRequest, match="either the text"):
        asked(text, None if file is None else Path(file))


def test_a_file_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff")

    with pytest.raises(ConfigurationError, match=r"picture is damaged: it is not UTF-8"):
        asked(None, tmp_path / "picture")
    with pytest.raises(ConfigurationError, match=r"nothing cannot be read: No such file"):
        asked(None, tmp_path / "nothing")


def test_a_question_is_read_from_standard_input(tmp_path: Path) -> None:
    with running_ingress() as ingress:
        azu("prompt", "-", home=tmp_path, given="What is\n东京?\n", AZU_URL=ingress.url, AZU_API_KEY="k")

    (request,) = ingress.requests
    assert request.body["messages"] == [{"role": "user", "content": "What is\n东京?"}]


def test_where_the_job_stands_is_told_beside_the_answer_and_not_to_programs(tmp_path: Path) -> None:
    phases = [
        {"name": "fetching", "text": "Fetching shards: 3 of 9.", "done": 3, "total": 9},
        {"name": "fetching", "text": "Fetching shards: 3 of 9.", "done": 3, "total": 9},
        {"name": "answering", "text": "Answering: 1 of at most 9 tokens.", "done": 1, "total": 9},
    ]
    comments = [
        Comment(f"phase {json.dumps(phase | {'bytes_done': None, 'bytes_total': None})}") for phase in phases
    ]
    texts = (delta("Pa"), comments[2], delta("ris", finish="stop"))
    chunks = (*comments[:2], *texts, last_chunk(ChatChunk), "[DONE]")
    with running_ingress() as ingress:
        ingress.replies["POST /v1/chat/completions"] = Reply(chunks=chunks)
        given = {"home": tmp_path, "AZU_URL": ingress.url, "AZU_API_KEY": "k"}
        shown, for_programs = azu("prompt", "x", **given), azu("prompt", "x", "--json", **given)

    told = shown.stderr.splitlines()
    assert told[:2] == [f"Waiting for {ingress.url} to take the prompt.", "Fetching shards: 3 of 9."]
    assert not [line for line in told[2:] if "Fetching" in line or "Answering" in line]
    assert shown.stdout.startswith("Paris")
    assert "Fetching" not in for_programs.stderr
