"""LangChain's OpenAI classes work unchanged, with only a base URL and a key."""

from pathlib import Path

import pytest

from tests.deployments.served import served

langchain_openai = pytest.importorskip("langchain_openai", reason="pip install 'azu[prove]'")
pytestmark = pytest.mark.prove

ASK = "What is the capital of France?"


def test_a_chat_is_answered_streamed_batched_and_completed(redis_url: str, tmp_path: Path) -> None:
    with served(redis_url, tmp_path) as here:
        at = {
            "base_url": f"{here.url}/v1",
            "api_key": here.api_key,
            "model": "azu/tiny-dense",
            "max_tokens": 5,
        }
        chat = langchain_openai.ChatOpenAI(**at, temperature=0, stop=["never"], seed=7)
        before = here.money()[0]

        answer = chat.invoke([("system", "Be brief."), ("human", ASK)])
        pieces = [piece.content for piece in chat.stream(ASK)]
        both = chat.batch([ASK, "And of Spain?"])
        again = chat.invoke([("human", ASK), answer, ("human", "Are you sure?")])
        text = langchain_openai.OpenAI(**at).invoke("Hello")

        usage = answer.usage_metadata
        assert answer.content == "".join(pieces) == text == both[1].content == again.content != ""
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert answer.response_metadata["finish_reason"] == "stop"
        assert answer.response_metadata["token_usage"]["cost_lamports"] == 2 * 6 * usage["total_tokens"]
        assert here.money()[0] < before
        print(f"LangChain: 6 calls answered and paid, {before - here.money()[0]} lamports")
