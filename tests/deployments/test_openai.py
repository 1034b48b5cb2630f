"""OpenAI's requests are understood or refused by the name of the parameter, never bent."""

import pytest
from pydantic import ValidationError

from azu.errors import InvalidRequest
from azu.protocol.job import FinishReason
from deployments.openai import Answer, ChatRequest, CompletionRequest, Message

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize(
    "neutral",
    [
        {"n": 1},
        {"stop": None},
        {"tools": []},
        {"response_format": {"type": "text"}},
        {"user": "u"},
        {"seed": 5},
    ],
)
def test_what_asks_for_nothing_is_taken(neutral: dict[str, object]) -> None:
    assert ChatRequest.model_validate(CHAT | neutral).model == "m"


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("n", 2),
        ("n", True),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("audio", {}),
        ("modalities", ["audio"]),
    ],
)
def test_what_would_change_the_output_is_refused_by_name(param: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ChatRequest.model_validate(CHAT | {param: value})

    assert refused.value.param == param


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"temperature": "0.5"},
        {"temperature": float("nan")},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"seed": 2**70},
        {"messages": []},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"stream": "yes"},
    ],
)
def test_values_out_of_range_and_unknown_keys_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate(CHAT | change)


def test_a_message_in_parts_is_joined_and_a_developer_is_a_system() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    message = Message.model_validate({"role": "developer", "content": parts})

    assert message.for_template() == {"role": "system", "content": "Hello"}


def test_a_completion_takes_one_prompt_as_it_is() -> None:
    assert CompletionRequest.model_validate({"model": "m", "prompt": " x"}).prompt == " x"
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"model": "m", "prompt": ["a", "b"]})


def test_a_streamed_chat_opens_with_its_role_and_closes_with_its_reason() -> None:
    answer = Answer(chat=True, job_id="job-1", model="m", created_s=7)

    opening, closing = answer.opening(), answer.closing(FinishReason.LENGTH)

    assert opening is not None
    assert opening["object"] == "chat.completion.chunk"
    assert opening["choices"][0]["delta"]["role"] == "assistant"
    assert closing["choices"][0]["finish_reason"] == "length"
    assert answer.usage_chunk({})["choices"] == []


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.CANCELLED])
def test_a_text_that_was_cut_off_by_its_reader_just_stops(reason: FinishReason) -> None:
    answer = Answer(chat=False, job_id="job-1", model="m", created_s=7)

    assert answer.whole("text", reason, {})["choices"][0]["finish_reason"] == "stop"
