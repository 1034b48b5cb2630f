"""`azu chat` sends what it showed, and says what all of it cost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from azu.api.openai import ChatChunk
from azu.cli import chat as chat_module
from azu.cli.chat import _Conversation
from azu.client import Client
from azu.errors import Unavailable, WorkerLost
from tests.cli.test_main import azu
from tests.client.answers import delta, last_chunk
from tests.client.ingress import Ingress, Reply, running_ingress

ANSWER = (delta("Pa"), delta("ris", finish="stop"), last_chunk(ChatChunk), "[DONE]")
RECEIPT = {
    "job_id": "job-1", "address": "0xa", "model_id": "m", "revision": "r", "prompt_tokens": 3,
    "completion_tokens": 2, "num_layers": 6, "lamports_per_token_layer": 2, "charged_lamports": 40,
    "released_lamports": 0, "platform_lamports": 8, "worker_lamports": {}, "transfer_id": "t", "topology": [],
    "token_layers": 30,
}  # fmt: skip


@pytest.fixture
def ingress() -> Iterator[Ingress]:
    with running_ingress() as running:
        running.replies["POST /v1/chat/completions"] = Reply(chunks=ANSWER)
        yield running


def conversation(ingress: Ingress, **given: Any) -> _Conversation:
    return _Conversation(Client(ingress.url, "k"), "m", "", given, exact=True)


def sent(ingress: Ingress) -> list[list[dict[str, str]]]:
    return [one.body["messages"] for one in ingress.requests if one.method == "POST"]


def test_each_question_goes_out_with_what_was_said_and_the_system_text(
    ingress: Ingress, tmp_path: Path
) -> None:
    typed = (
        "Hello\n\n/system Be brief.\n/model azu/tiny-moe\n/nonsense\nAnd then?\n/new\nAgain\n/quit\nnever\n"
    )

    done = azu("chat", "--exact", home=tmp_path, given=typed, AZU_URL=ingress.url, AZU_API_KEY="k")

    assert done.returncode == 0, done.stderr
    told = {"role": "system", "content": "Be brief."}
    first, second = {"role": "user", "content": "Hello"}, {"role": "user", "content": "And then?"}
    answer = {"role": "assistant", "content": "Paris"}
    assert sent(ingress) == [
        [first],
        [told, first, answer, second],
        [told, {"role": "user", "content": "Again"}],
    ]
    assert [one.body["model"] for one in ingress.requests][1:] == ["azu/tiny-moe", "azu/tiny-moe"]
    assert done.stdout.count("Paris") == 3
    assert done.stdout.count("/quit") == 2, "at the start, and after a command that there is not"


def test_all_answers_together_have_a_cost(ingress: Ingress, capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(ingress)
    talk.ask("Hello")
    ingress.replies["POST /v1/chat/completions"] = Reply(
        chunks=(*(one | {"azu": one["azu"] | {"job_id": "job-2"}} for one in ANSWER[:-1]), "[DONE]")
    )
    talk.ask("Again")

    shown = capsys.readouterr().out
    assert ("60 lamports so far" in shown, "120 lamports so far" in shown) == (True, True)


def test_what_came_of_an_answer_that_fails_is_shown_sent_and_paid(
    ingress: Ingress, capsys: pytest.CaptureFixture[str]
) -> None:
    error = WorkerLost("a worker is lost").to_openai()
    ingress.replies["POST /v1/chat/completions"] = Reply(chunks=(delta("Pa"), error))
    talk = conversation(ingress)
    talk.ask("Hello")
    early = capsys.readouterr().out
    ingress.replies["GET /v1/receipts/job-1"] = Reply(RECEIPT)
    talk.tell_cost()

    assert talk.turns[-1] == {"role": "assistant", "content": "Pa"}
    assert "a worker is lost. Next: " in early
    assert "without one that is being settled" in early
    assert "40 lamports so far" in capsys.readouterr().out


def test_a_question_without_an_answer_is_not_sent_again(ingress: Ingress) -> None:
    refused = Unavailable("no room")
    ingress.replies["POST /v1/chat/completions"] = Reply(refused.to_openai(), refused.status)
    talk = conversation(ingress)
    talk.ask("Hello")
    ingress.replies["POST /v1/chat/completions"] = Reply(chunks=ANSWER)
    talk.ask("Again")

    assert sent(ingress)[1] == [{"role": "user", "content": "Again"}]


def test_ctrl_c_ends_an_answer_and_its_job_and_keeps_what_came(
    ingress: Ingress, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(stream: Any, url: str) -> Iterator[str]:
        yield next(iter(stream))
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, "shown", interrupted)
    talk = conversation(ingress)
    talk.ask("Hello")

    assert talk.turns == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Pa"}]
    assert "/v1/jobs/job-1/cancel" in [one.path for one in ingress.requests]
