"""An OpenAI request is taken as it is, or refused with the name of the parameter."""

import pytest
from pydantic import ValidationError

from azu.api.openai import ChatRequest, CompletionRequest, Message
from azu.errors import InvalidRequest

TEXT = {"model": "m", "prompt": "Hello"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


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
def test_a_value_that_asks_for_nothing_is_accepted(neutral: dict[str, object]) -> None:
    assert ChatRequest.model_validate(CHAT | neutral).model == "m"


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("best_of", 2),
        ("echo", True),
        ("suffix", "x"),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("response_format", "text"),
        ("response_format", {"type": "json_object"}),
        ("audio", {}),
        ("modalities", ["audio"]),
    ],
)
def test_an_unsupported_parameter_is_refused_by_name(param: str, value: object) -> None:
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
        {"n": 0},
        {"n": True},
        {"stop": ["a", ""]},
        {"stop": [7]},
        {"stop": 7},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        {"tools": [{"type": "retrieval"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "tool", "content": "4"}]},
        {"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]},
        {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
        {"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]},
        {
            "messages": [
                {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "["}}]}
            ]
        },
        {"top_logprobs": 21, "logprobs": True},
        {"stop_token_ids": ["7"]},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 101},
    ],
)
def test_values_out_of_range_and_unknown_keys_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate(CHAT | change)


def test_a_message_in_parts_is_joined_and_a_developer_is_a_system() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    message = Message.model_validate({"role": "developer", "content": parts})

    assert message.for_template() == {"role": "system", "content": "Hello"}


def test_an_answer_can_be_sent_back_and_its_calls_reach_the_template_as_values() -> None:
    answer = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL], "annotations": []}
    result = {"role": "tool", "content": "4", "tool_call_id": "call_1"}
    body = ChatRequest.model_validate(CHAT | {"messages": [answer, result], "tools": TOOLS})

    called, answered = (message.for_template() for message in body.messages)

    assert called["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert answered == {"role": "tool", "content": "4", "tool_call_id": "call_1"}


@pytest.mark.parametrize(
    ("param", "value"), [("parallel_tool_calls", False), ("logprobs", True), ("tool_choice", "any")]
)
def test_a_parameter_that_excludes_tools_is_refused_by_name(param: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ChatRequest.model_validate(CHAT | {"tools": TOOLS, param: value})

    assert refused.value.param == param


def test_tools_are_not_offered_if_the_model_may_not_call_them() -> None:
    asked = CHAT | {"tools": TOOLS, "parallel_tool_calls": True}

    assert ChatRequest.model_validate(asked).offered_tools == TOOLS
    assert ChatRequest.model_validate(asked | {"tool_choice": "none"}).offered_tools == []


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [(" x", " x"), ([" x"], " x"), ([5, 6], [5, 6]), ([[5, 6]], [5, 6])],
)
def test_a_completion_takes_one_prompt(prompt: object, expected: object) -> None:
    assert CompletionRequest.model_validate({"model": "m", "prompt": prompt}).prompt == expected


@pytest.mark.parametrize("prompt", [["a", "b"], [], [[]], "", [""], [5, "a"], [True], [[5], [6]], None, {}])
def test_a_completion_takes_no_other_form_of_prompt(prompt: object) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"model": "m", "prompt": prompt})


def test_stop_is_one_string_or_several() -> None:
    assert CompletionRequest.model_validate(TEXT | {"stop": "END"}).stop == ["END"]
    assert CompletionRequest.model_validate(TEXT | {"stop": ["a", "b"]}).stop == ["a", "b"]
    assert CompletionRequest.model_validate(TEXT).stop == []


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
    ],
)
def test_a_chat_asks_for_log_probabilities_with_two_parameters(
    asked: dict[str, object], expected: int | None
) -> None:
    assert ChatRequest.model_validate(CHAT | asked).num_logprobs == expected


def test_top_logprobs_without_logprobs_are_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        _ = ChatRequest.model_validate(CHAT | {"top_logprobs": 3}).num_logprobs

    assert refused.value.param == "top_logprobs"


def test_a_completion_asks_for_log_probabilities_with_a_number() -> None:
    assert CompletionRequest.model_validate(TEXT | {"logprobs": 2}).num_logprobs == 2
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate(TEXT | {"logprobs": True})
