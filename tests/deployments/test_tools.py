"""Tools reach the model through its template, and its calls come back as OpenAI's clients expect them."""

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from azu.engine.answer_parser import AnswerParser
from azu.errors import BrokenCheckpoint
from azu.protocol.answer import ToolCall
from tests.deployments.local import LocalIngress, local_ingress
from tests.models.questions import built_in_folder

# Tools as JSON, calls between <tool_call> tags, thoughts between <think> tags: as Qwen's models have it.
TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ eos_token }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}"
    "{{ eos_token }}{% endfor %}<|assistant|>"
)
RESPONSE = {
    "start_anchor": "<|assistant|>",
    "defaults": {"role": "assistant"},
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {},
    },
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
MESSAGES: list[Any] = [{"role": "user", "content": "What is 2 + 2?"}]
ADD = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": "😀"}}</tool_call>'
TWICE = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
Scenario = Callable[[LocalIngress, str], Awaitable[None]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: one whose template takes tools, one that has no response template."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("caller", "talker"):
        shutil.copytree(built_in_folder("azu/tiny-dense"), folder / name)
        (folder / name / "chat_template.jinja").write_text(TEMPLATE)
    path = folder / "caller" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"response_template": RESPONSE}))
    return folder


def spoken(text: str) -> tuple[int, ...]:
    tokenizer = AutoTokenizer.from_pretrained(built_in_folder("azu/tiny-dense"))
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture
def play(redis_url: str, tmp_path: Path, root: Path) -> Callable[..., None]:
    async def run(scenario: Scenario, text: str) -> None:
        async with local_ingress(redis_url, tmp_path, model_roots=(root,)) as ingress:
            ingress.model.token_ids = spoken(text)
            _, api_key = await ingress.user()
            async with ingress.client(api_key) as http:
                client = openai.AsyncOpenAI(base_url="http://azu.test/v1", api_key=api_key, http_client=http)
                await asyncio.wait_for(scenario(client, str(root / "caller")), 120)

    return lambda scenario, text: asyncio.run(run(scenario, text))


@pytest.mark.parametrize("stream", [False, True])
def test_calls_come_apart_from_the_text_and_end_the_turn(play, stream: bool) -> None:
    async def scenario(client: openai.AsyncOpenAI, model: str) -> None:
        asked = {"model": model, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 200}
        if stream:
            content, calls, reasons = "", {}, []
            async for chunk in await client.chat.completions.create(**asked, stream=True):
                choice = chunk.choices[0]
                content += choice.delta.content or ""
                for call in choice.delta.tool_calls or []:
                    calls[call.index] = call
                reasons.append(choice.finish_reason)
            calls, reason = [call for _, call in sorted(calls.items())], reasons[-1]
        else:
            choice = (await client.chat.completions.create(**asked)).choices[0]
            content, calls, reason = choice.message.content, choice.message.tool_calls, choice.finish_reason
            assert choice.message.reasoning_content == "hm"

        assert content == "Let me see. "
        assert [(call.type, call.function.name) for call in calls] == [("function", "add")] * 2
        assert [json.loads(call.function.arguments) for call in calls] == [{"a": 2, "b": "😀"}, {}]
        assert len({call.id for call in calls}) == 2
        assert reason == "tool_calls"

    play(scenario, f"<think>hm</think>Let me see. {ADD}{TWICE}")


def test_the_answer_and_the_tools_result_are_taken_back(play) -> None:
    async def scenario(client: openai.AsyncOpenAI, model: str) -> None:
        asked = {"model": model, "tools": TOOLS, "max_tokens": 200}
        answer = await client.chat.completions.create(**asked, messages=MESSAGES)
        message = answer.choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "4"}

        again = await client.chat.completions.create(**asked, messages=[*MESSAGES, message, result])

        written = len(spoken(ADD))
        assert again.usage.prompt_tokens > answer.usage.prompt_tokens + written

    play(scenario, ADD)


@pytest.mark.parametrize(
    "text", ["Just words.", "<tool_call>no JSON</tool_call> after", "<tool_call>{", "a <tool"]
)
def test_what_is_no_call_is_content_as_the_model_wrote_it(play, text: str) -> None:
    async def scenario(client: openai.AsyncOpenAI, model: str) -> None:
        asked = {"model": model, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 200}
        choice = (await client.chat.completions.create(**asked)).choices[0]
        assert choice.message.content == text
        assert not choice.message.tool_calls
        assert choice.finish_reason == "stop"

    play(scenario, text)


def test_tools_are_refused_by_name_where_the_template_does_not_support_them(play) -> None:
    async def scenario(client: openai.AsyncOpenAI, model: str) -> None:
        for other in ("azu/tiny-dense", model.replace("caller", "talker")):
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(model=other, messages=MESSAGES, tools=TOOLS)
            assert refused.value.param == "tools"
            answer = await client.chat.completions.create(
                model=other, messages=MESSAGES, tools=TOOLS, tool_choice="none", max_tokens=200
            )
            assert answer.choices[0].message.content == ADD

    play(scenario, ADD)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_an_answer_is_read_the_same_in_pieces_of_any_size(size: int) -> None:
    text = f"<think>hm</think>Well. {ADD}and{TWICE} <tool_call>[1]</tool_call> x"
    parser = AnswerParser(RESPONSE, "<|user|>x<|assistant|>", TOOLS)

    parts = [parser.push(text[at : at + size]) for at in range(0, len(text), size)]
    parts.append(parser.finish())

    calls = [call for part in parts for call in part.tool_calls]
    assert [call.name for call in calls] == (["add", "add"] if size < 1000 else [])
    if size == 1:
        assert "".join(part.reasoning for part in parts) == "hm"
        assert "".join(part.content for part in parts) == "Well. and <tool_call>[1]</tool_call> x"
        assert calls[1] == ToolCall("add", "{}")


@pytest.mark.parametrize(
    "template", [{}, {"fields": 7}, {"start_anchor": "x", "fields": {"content": {"open": 7}}}]
)
def test_a_template_that_is_none_is_a_broken_checkpoint(template: dict[str, object]) -> None:
    with pytest.raises(BrokenCheckpoint):
        AnswerParser(template, "", TOOLS)
