"""An answer as the client returns it: all parts that came, typed, and sent on as they are."""

from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest

import azu
from azu.api.jobs import QuoteResponse
from azu.api.openai import (
    AlternativeToken,
    ChatChunk,
    ChatLogprobs,
    ChatRequest,
    ChosenToken,
    ChunkCall,
    CompletionRequest,
    FunctionCall,
    TextLogprobs,
)
from azu.client import Client
from azu.client.parameters import ChatParameters, TextParameters
from tests.client.answers import MODEL, delta, last_chunk, piece
from tests.client.ingress import Ingress, Reply, running_ingress

CHAT = "POST /v1/chat/completions"
TEXT = "POST /v1/completions"
SAID = {"weather": '{"city": "Paris"}', "time": '{"zone": "CET"}'}
OTHER = AlternativeToken(token="Lyon", logprob=-2.0, bytes=None)


@pytest.fixture
def ingress(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ingress]:
    with running_ingress() as running:
        monkeypatch.setenv("AZU_URL", running.url)
        monkeypatch.setenv("AZU_API_KEY", "azu-sk-key")
        yield running


def call(index: int, name: str) -> ChunkCall:
    function = FunctionCall(name=name, arguments=SAID[name])
    return ChunkCall(index=index, id=f"call_{index}", function=function)


def token(text: str) -> ChatLogprobs:
    chosen = ChosenToken(token=text, logprob=-0.5, bytes=tuple(text.encode()), top_logprobs=(OTHER,))
    return ChatLogprobs(content=(chosen,))


def ended(*chunks: Any) -> Reply:
    return Reply(chunks=(*chunks, last_chunk(ChatChunk), "[DONE]"))


def test_reasoning_and_tool_calls_are_kept_and_sent_back_as_they_came(ingress: Ingress) -> None:
    ingress.replies[CHAT] = ended(
        delta("", role="assistant"),
        delta(None, reasoning_content="Where is "),
        delta(None, reasoning_content="it?"),
        delta(None, tool_calls=(call(0, "weather"),)),
        delta(None, tool_calls=(call(1, "time"),)),
        delta(None, finish="tool_calls"),
    )
    tools = [{"type": "function", "function": {"name": name}} for name in SAID]
    messages: list[Any] = [{"role": "user", "content": "Is it warm?"}]

    answer = azu.chat(messages, model=MODEL, tools=tools)

    assert (answer.text, answer.reasoning, answer.finish_reason) == ("", "Where is it?", "tool_calls")
    assert {one.function.name: one.function.arguments for one in answer.tool_calls} == SAID
    messages += [
        answer.message,
        *({"role": "tool", "tool_call_id": one.id, "content": "20"} for one in answer.tool_calls),
    ]
    ingress.replies[CHAT] = ended(delta("Yes.", finish="stop"))
    assert azu.chat(messages, model=MODEL, tools=tools).text == "Yes."
    sent = ChatRequest.model_validate(ingress.requests[-1].body).messages
    assert [one.role for one in sent] == ["user", "assistant", "tool", "tool"]
    assert sent[1].reasoning_content == "Where is it?"
    assert [one.id for one in sent[1].tool_calls or ()] == [one.tool_call_id for one in sent[2:]]


def test_the_log_probabilities_of_all_tokens_are_kept(ingress: Ingress) -> None:
    ingress.replies[CHAT] = ended(
        delta("Pa", logprobs=token("Pa")), delta("ris", logprobs=token("ris")), delta(None, finish="stop")
    )
    parts = [
        TextLogprobs(tokens=(text,), token_logprobs=(-0.5,), top_logprobs=({text: -0.5},), text_offset=(at,))
        for at, text in ((0, "Pa"), (2, "ris"))
    ]
    ingress.replies[TEXT] = Reply(
        chunks=(
            piece("Pa", logprobs=parts[0]), piece("ris", logprobs=parts[1], finish="stop"), last_chunk(),
            "[DONE]",
        )
    )  # fmt: skip

    chat = azu.chat("Where?", model=MODEL, logprobs=True, top_logprobs=1).choices[0].logprobs
    text = azu.generate("Where?", model=MODEL, logprobs=1).choices[0].logprobs

    assert chat is not None
    assert [(one.token, one.top_logprobs) for one in chat.content] == [("Pa", (OTHER,)), ("ris", (OTHER,))]
    assert text is not None
    assert (text.tokens, text.text_offset) == (("Pa", "ris"), (0, 2))
    assert text.top_logprobs == ({"Pa": -0.5}, {"ris": -0.5})


def test_what_is_no_text_streams_as_chunks(ingress: Ingress) -> None:
    ingress.replies[CHAT] = ended(delta(None, reasoning_content="Hm."), delta("Paris.", finish="stop"))

    with Client() as client, client.chat_stream("Where?", model=MODEL) as stream:
        found = [choice.delta for chunk in stream.chunks() for choice in chunk.choices]

        assert [(one.reasoning_content, one.content) for one in found] == [("Hm.", None), (None, "Paris.")]
        assert stream.result().text == "Paris."


def test_an_answer_that_begins_again_after_a_break_is_there_once(ingress: Ingress) -> None:
    ingress.replies[CHAT] = Reply(chunks=(delta("", role="assistant"), delta(None, reasoning_content="H")))
    whole = (delta("", role="assistant"), delta(None, reasoning_content="Hm."), delta("Yes.", finish="stop"))
    ingress.replies["GET /v1/jobs/job-1/stream?chat=true&after=0"] = ended(*whole)

    answer = azu.chat("Is it?", model=MODEL)

    assert (answer.reasoning, answer.text) == ("Hm.", "Yes.")


@pytest.mark.parametrize(
    ("parameters", "request_model"), [(ChatParameters, ChatRequest), (TextParameters, CompletionRequest)]
)
def test_the_parameters_are_those_of_the_request(parameters: type, request_model: Any) -> None:
    own = {"model", "messages", "prompt", "stream", "stream_options"}

    assert get_type_hints(parameters).keys() == request_model.model_fields.keys() - own


def test_a_stream_of_the_module_closes_its_client(ingress: Ingress) -> None:
    ingress.replies[CHAT] = ended(delta("Paris.", finish="stop"))

    stream = azu.chat_stream("Where?", model=MODEL)

    assert not stream._inner._wire.http.is_closed
    assert "".join(stream) == "Paris."
    assert stream._inner._wire.http.is_closed


def test_a_quote_says_what_a_prompt_costs(ingress: Ingress) -> None:
    quoted = {
        "model": MODEL, "num_layers": 6, "prompt_tokens": 3, "max_tokens": 9, "expected_tokens": 5,
        "lamports_per_token_layer": 2, "max_lamports": 144, "expected_lamports": 96, "prediction": None,
    }  # fmt: skip
    ingress.replies["POST /v1/quote"] = Reply(quoted)

    with Client() as client:
        found = client.quote("The capital", model=MODEL, max_tokens=9)

    assert found == QuoteResponse(**quoted)
    assert ingress.requests[0].body == {
        "model": MODEL, "prompt": "The capital", "max_tokens": 9, "n": 1,
    }  # fmt: skip


def test_the_errors_are_a_part_of_the_module(ingress: Ingress) -> None:
    error = azu.errors.RateLimited("slow down")
    ingress.replies[CHAT] = Reply(error.to_openai(), error.status)

    with pytest.raises(azu.errors.RateLimited):
        azu.chat("Where?", model=MODEL)


def test_the_module_names_its_version() -> None:
    from importlib.metadata import version

    assert azu.__version__ == version("azu")
    with pytest.raises(AttributeError, match="invented"):
        azu.invented  # noqa: B018
