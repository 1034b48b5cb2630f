"""The blocks of docs/python.md run as they are written, in their order, on a network."""

import re
import time
from pathlib import Path

import pytest

from azu.api.openai import ChatChunk, ChatRequest, ChunkCall, FunctionCall
from azu.client import Client
from tests.client.answers import delta, last_chunk
from tests.client.ingress import Reply, running_ingress
from tests.network.user import User

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def blocks() -> list[str]:
    """Return the blocks; the last one needs a model with tools, which the network does not have."""
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)


@pytest.mark.cluster
@pytest.mark.prove
def test_the_blocks_run_and_each_answer_is_paid_once(
    user: User, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AZU_URL", user.url)
    monkeypatch.setenv("AZU_API_KEY", user.api_key)
    monkeypatch.delenv("AZU_TLS_CA", raising=False)
    with Client() as client:
        known = {job.job_id for job in client.jobs()}
        before = client.balance().available_lamports
        names: dict[str, object] = {}

        for block in blocks()[:-1]:
            exec(block, names)

        while any(job.status in ("queued", "running") for job in client.jobs()):
            time.sleep(0.05)
        new = [job for job in client.jobs() if job.job_id not in known]
        by_status = sorted(job.status for job in new)
        assert by_status == ["cancelled"] + ["done"] * 9
        assert before - client.balance().available_lamports == sum(job.charged_lamports or 0 for job in new)
        cancelled = next(job.job_id for job in new if job.status == "cancelled")
        assert 0 < client.receipt(cancelled).completion_tokens < 200
    shown = capsys.readouterr().out
    assert "layers 0 to" in shown
    assert "temperature" in shown


def test_the_block_with_tools_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    function = FunctionCall(name="temperature", arguments='{"city": "Paris"}')
    call = delta(None, tool_calls=(ChunkCall(index=0, id="call_0", function=function),), finish="tool_calls")
    last = (last_chunk(ChatChunk), "[DONE]")
    with running_ingress() as ingress:
        monkeypatch.setenv("AZU_URL", ingress.url)
        monkeypatch.setenv("AZU_API_KEY", "azu-sk-key")

        def answer(body: object) -> Reply:
            asked = ChatRequest.model_validate(body).messages
            said = delta(str(asked[-1].content), finish="stop") if len(asked) > 1 else call
            return Reply(chunks=(said, *last))

        ingress.replies["POST /v1/chat/completions"] = answer
        exec("import azu\n" + blocks()[-1], {})

    assert capsys.readouterr().out == "21 degrees in Paris\n"
