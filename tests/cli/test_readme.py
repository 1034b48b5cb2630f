"""The blocks of README's "Use it" run as they are written, after the commands before them."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from azu.client.machine import Credential, store_credential
from tests.client.answers import last_chunk
from tests.client.ingress import PLATFORM, Ingress, Reply, running_ingress

README = Path(__file__).parents[2] / "README.md"
HEAD = {"id": "cmpl-job-1", "created": 7, "model": "azu/tiny-dense"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def section() -> str:
    return README.read_text().partition("## Use it\n")[2].partition("\n## ")[0]


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", section(), re.M | re.S)


def chunks() -> tuple[object, ...]:
    text = {"index": 0, "text": "Paris.", "logprobs": None, "finish_reason": "stop"}
    azu = {"job_id": "job-1", "after": 1}
    kept = {**HEAD, "object": "text_completion", "azu": azu}
    return ({**kept, "choices": [text]}, last_chunk(), "[DONE]")


@pytest.fixture
def logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ingress]:
    """A network that a user of this machine has logged in to."""
    message = {"role": "assistant", "content": "Paris."}
    answer = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    with running_ingress() as ingress:
        ingress.replies["POST /v1/chat/completions"] = Reply(
            {**HEAD, "object": "chat.completion", "choices": [answer], "usage": USAGE}
        )
        store_credential(tmp_path, ingress.url, Credential("azu-sk-1", "0x" + "a1" * 20, PLATFORM))
        for name in ("AZU_URL", "AZU_API_KEY", "AZU_TLS_CA"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AZU_HOME", str(tmp_path))
        yield ingress


def exported(home: Path) -> dict[str, str]:
    """Return what README's `eval` of `azu login --show` sets in a shell."""
    (command,) = re.findall(r"`(eval [^`]+)`", section())
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    program = f'{command} && printf "%s %s" "$AZU_URL" "$AZU_API_KEY"'
    done = subprocess.run(
        ["bash", "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    url, key = done.stdout.split()
    return {"AZU_URL": url, "AZU_API_KEY": key}


def test_the_python_block_needs_nothing_but_the_login(
    logged_in: Ingress, capsys: pytest.CaptureFixture[str]
) -> None:
    logged_in.replies["POST /v1/completions"] = Reply(chunks=chunks())

    exec(python_blocks()[0], {})

    assert capsys.readouterr().out == "Paris.\nParis."
    assert {one.authorization for one in logged_in.requests} == {"Bearer azu-sk-1"}


def test_the_blocks_for_other_programs_run_after_the_line_that_sets_the_variables(
    logged_in: Ingress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = exported(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    logged_in.replies["POST /v1/completions"] = Reply(HEAD)
    curl = re.search(r"^    curl .*\n.*\n", section(), re.M)
    assert curl is not None

    exec(python_blocks()[1], {})
    subprocess.run(["bash", "-c", curl[0]], capture_output=True, check=True, timeout=300)

    assert capsys.readouterr().out == "Paris.\n"
    assert variables == {"AZU_URL": logged_in.url, "AZU_API_KEY": "azu-sk-1"}
    sent = [(one.path, one.authorization) for one in logged_in.requests]
    bearer = "Bearer azu-sk-1"
    assert sent == [("/v1/chat/completions", bearer), ("/v1/completions", bearer)]
