"""Answers and chunks have OpenAI's shapes: OpenAI's own types parse them."""

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from transformers import AutoTokenizer

from azu.api.base import ResponseModel
from azu.api.openai import Usage
from azu.engine.text import ParsedAnswer, TextDelta, ToolCall, joined
from azu.engine.tokenizer import AnswerParser, Tokenizer
from azu.errors import BrokenCheckpoint
from azu.jobs.redis import RedisJobs
from azu.protocol.job import FinishReason, Job, JobOutcome, JobState, Receipt, TokenEvent
from azu.protocol.sampling import SamplingParams
from deployments.answers import AnswerFormatter, follow, usage_of
from tests import builders
from tests.deployments.local import LocalIngress, local_ingress
from tests.models.questions import built_in_folder

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
USAGE = Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3, cost_lamports=18)
FOLDER = Path(__file__).parents[2] / "configs" / "models" / "tiny-dense"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(FOLDER)


def answer(tokenizer: Tokenizer, *, chat: bool) -> AnswerFormatter:
    return AnswerFormatter(chat=chat, job_id="job-1", model="m", created_s=7, decoder=tokenizer)


def with_logprobs(tokenizer: Tokenizer, text: str) -> TextDelta:
    """Return a whole choice whose tokens have the log probability -0.5 and two alternatives."""
    ids = tuple(tokenizer.encode(text))
    decode = AutoTokenizer.from_pretrained(FOLDER).decode
    offsets = tuple(len(decode(ids[:index], skip_special_tokens=True)) for index in range(len(ids)))
    top = tuple(((token_id, -0.5), (ids[0], float("-inf"))) for token_id in ids)
    return TextDelta(text, offsets, 0, ids, (-0.5,) * len(ids), top, finish_reason=FinishReason.STOP)


def as_json(body: ResponseModel | None) -> dict[str, Any]:
    assert body is not None
    sent: dict[str, Any] = json.loads(body.model_dump_json())
    return sent


def test_a_streamed_chat_opens_with_its_role_and_closes_with_its_reason(tokenizer: Tokenizer) -> None:
    made = answer(tokenizer, chat=True)

    opening = made.opening(1)
    text, closing = made.chunks(TextDelta("Hi", choice=1, finish_reason=FinishReason.LENGTH, after=7))

    first, second, last = (ChatCompletionChunk.model_validate(as_json(c)) for c in (opening, text, closing))
    assert (first.choices[0].index, first.choices[0].delta.role) == (1, "assistant")
    assert (second.choices[0].delta.content, second.choices[0].finish_reason) == ("Hi", None)
    assert last.choices[0].finish_reason == "length"
    assert made.usage_chunk(USAGE).choices == ()


@pytest.mark.parametrize("chat", [True, False])
def test_a_chunk_names_the_choice_that_it_belongs_to(tokenizer: Tokenizer, chat: bool) -> None:
    made = answer(tokenizer, chat=chat)
    deltas = [TextDelta(text, choice=choice, finish_reason=STOP) for choice, text in ((2, "c"), (0, "a"))]

    chunks = [as_json(chunk) for delta in deltas for chunk in made.chunks(delta)]

    assert [chunk["choices"][0]["index"] for chunk in chunks] == [2, 2, 0, 0]
    assert [choice.index for choice in made.whole(deltas, USAGE).choices] == [2, 0]


CHUNK = {"id": "chatcmpl-job-1", "created": 7, "model": "m", "object": "chat.completion.chunk"}


def test_a_chunk_has_the_keys_that_it_needs_and_no_others(tokenizer: Tokenizer) -> None:
    made = answer(tokenizer, chat=True)
    delta = TextDelta("Hi", reasoning="hm", finish_reason=STOP, after=3)

    opening, text, closing, counted = map(
        as_json, [made.opening(0), *made.chunks(delta), made.usage_chunk(USAGE)]
    )

    for chunk, content, reason in (
        (opening, {"role": "assistant", "content": ""}, None),
        (text, {"content": "Hi", "reasoning_content": "hm"}, None),
        (closing, {}, "stop"),
    ):
        after = 3 if chunk in (text, closing) else 0
        choice = {"index": 0, "delta": content, "logprobs": None, "finish_reason": reason}
        assert chunk == CHUNK | {"azu": {"job_id": "job-1", "after": after}, "choices": [choice]}
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "cost_lamports": 18}
    assert counted == CHUNK | {"azu": {"job_id": "job-1"}, "choices": [], "usage": usage}


def test_a_whole_chat_has_the_keys_that_it_needs_and_no_others(tokenizer: Tokenizer) -> None:
    choice = TextDelta("", tool_calls=(ToolCall("f", "{}"),), num_calls=1, finish_reason=STOP)

    whole = as_json(answer(tokenizer, chat=True).whole([choice], usage_of(1, 2, None)))

    call = {"id": "call_1_0_0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    assert whole == CHUNK | {
        "object": "chat.completion",
        "azu": {"job_id": "job-1"},
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.CANCELLED])
def test_a_text_that_its_reader_cut_off_ends_with_stop(tokenizer: Tokenizer, reason: FinishReason) -> None:
    whole = answer(tokenizer, chat=False).whole([TextDelta("text", finish_reason=reason)], USAGE)

    assert whole.choices[0].finish_reason == "stop"


def test_all_choices_are_in_one_answer(tokenizer: Tokenizer) -> None:
    choices = [
        TextDelta("a", finish_reason=FinishReason.STOP),
        TextDelta("b", choice=1, finish_reason=FinishReason.LENGTH),
    ]

    whole = ChatCompletion.model_validate(as_json(answer(tokenizer, chat=True).whole(choices, USAGE)))

    assert [choice.message.content for choice in whole.choices] == ["a", "b"]
    assert [choice.finish_reason for choice in whole.choices] == ["stop", "length"]


def test_a_chats_log_probabilities_carry_the_tokens_bytes(tokenizer: Tokenizer) -> None:
    whole = answer(tokenizer, chat=True).whole([with_logprobs(tokenizer, "ok 😀")], USAGE)

    (choice,) = ChatCompletion.model_validate(as_json(whole)).choices

    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert bytes(byte for token in tokens for byte in token.bytes or []).decode().endswith("ok 😀")
    assert {token.logprob for token in tokens} == {-0.5}
    assert [alternative.logprob for alternative in tokens[0].top_logprobs] == [-0.5, -9999.0]


def test_a_completions_log_probabilities_are_parallel_lists(tokenizer: Tokenizer) -> None:
    found = with_logprobs(tokenizer, "two words")
    whole = answer(tokenizer, chat=False).whole([found], USAGE)

    (choice,) = Completion.model_validate(as_json(whole)).choices

    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == list(found.token_offsets)
    assert choice.logprobs.token_logprobs == [-0.5] * len(found.token_ids)
    tokens, top = choice.logprobs.tokens or [], choice.logprobs.top_logprobs or []
    assert len(tokens) == len(top) == len(found.token_ids)


def test_parts_of_characters_are_spelled_in_bytes_and_the_best_of_equal_texts_stays(
    tokenizer: Tokenizer,
) -> None:
    parts = [one for one in range(300) if "\ufffd" in tokenizer.token_text(one)][:2]
    top = ((parts[0], -0.5), (parts[1], -1.0), (40, -2.0), (40, -3.0))
    delta = TextDelta("", (0,), token_ids=(parts[0],), logprobs=(-0.5,), top_logprobs=(top,))

    choice = answer(tokenizer, chat=False).whole([delta], USAGE).choices[0]

    spelled = ["bytes:" + "".join(f"\\x{b:02x}" for b in tokenizer.token_bytes(one) or ()) for one in parts]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == (spelled[0],)
    (found,) = choice.logprobs.top_logprobs or ()
    assert list(found.items()) == [(spelled[0], -0.5), (spelled[1], -1.0), (tokenizer.token_text(40), -2.0)]


def outcome(job: Job, state: JobState, reason: FinishReason) -> JobOutcome:
    receipt = Receipt(
        job_id=job.job_id, address=job.address, model_id=job.model_id, revision=job.revision, prompt_tokens=4,
        completion_tokens=1, num_layers=4, lamports_per_token_layer=2, charged_lamports=0,
        released_lamports=0, platform_lamports=0, worker_lamports={}, transfer_id="t",
    )  # fmt: skip
    return JobOutcome(state, reason, receipt)


def followed(
    redis_url: str, tokenizer: Tokenizer, job: Job, events: list[TokenEvent], end: JobOutcome, after: int = 0
) -> list[TextDelta | JobOutcome]:
    async def play() -> list[TextDelta | JobOutcome]:
        jobs = RedisJobs.from_url(redis_url)
        await jobs.submit(job)
        for event in events:
            await jobs.append([(job.job_id, event)])
        await jobs.finish(job.job_id, end)
        return [part async for part in follow(jobs, job, tokenizer, after)]

    return asyncio.run(asyncio.wait_for(play(), 20))


def texts(parts: list[TextDelta | JobOutcome], num_choices: int = 1) -> list[str]:
    found = [part for part in parts if isinstance(part, TextDelta)]
    return ["".join(part.text for part in found if part.choice == n) for n in range(num_choices)]


def scored(parts: list[TextDelta | JobOutcome]) -> list[float]:
    return sorted(logprob for part in parts if isinstance(part, TextDelta) for logprob in part.logprobs)


def test_the_choices_of_a_job_are_kept_apart(redis_url: str, tokenizer: Tokenizer) -> None:
    job = builders.job(choices=2)
    one, two = tokenizer.encode("one 😀"), tokenizer.encode("two 漢字")
    events, index = [], 0
    for position in range(max(len(one), len(two))):
        for choice, ids in enumerate((one, two)):
            if position < len(ids):
                reason = (STOP, LENGTH)[choice] if position == len(ids) - 1 else None
                events.append(TokenEvent(index, (ids[position],), choice=choice, finish_reason=reason))
                index += 1

    parts = followed(redis_url, tokenizer, job, events, end := outcome(job, JobState.DONE, LENGTH))

    assert [text.strip() for text in texts(parts, 2)] == ["one 😀", "two 漢字"]
    reasons = {
        part.choice: part.finish_reason
        for part in parts
        if isinstance(part, TextDelta) and part.finish_reason
    }
    assert reasons == {0: STOP, 1: LENGTH}
    assert parts[-1] == end


def test_a_reader_that_comes_back_gets_the_rest_and_no_text_twice(
    redis_url: str, tokenizer: Tokenizer
) -> None:
    job = builders.job(choices=2, sampling=SamplingParams(max_tokens=50, stop=("漢字!", "😀😀"), logprobs=0))
    written = [tokenizer.encode(text) for text in ("one 漢字 😀 漢", "two 😀 and 漢字!")]
    events: list[TokenEvent] = []
    for choice, ids in ((0, written[0][:3]), (1, written[1][:-1]), (0, written[0][3:]), (1, written[1][-1:])):
        reason = STOP if len(events) >= 2 else None
        index = sum(len(event.token_ids) for event in events)
        scores = tuple(-float(index + n) for n in range(len(ids)))
        top = tuple(() for _ in ids)
        events.append(TokenEvent(index, tuple(ids), scores, top, choice, reason))
    parts = followed(redis_url, tokenizer, job, events, end := outcome(job, JobState.DONE, STOP))

    for seen in {part.after for part in parts if isinstance(part, TextDelta)} | {0}:
        shown = [part for part in parts if isinstance(part, TextDelta) and part.after <= seen]

        again = followed(redis_url, tokenizer, job, events, end, after=seen)

        assert again[-1] == end
        assert [a + b for a, b in zip(texts(shown, 2), texts(again, 2), strict=True)] == texts(parts, 2)
        assert scored([*shown, *again]) == scored(parts)
        assert {
            part.choice for part in [*shown, *again] if isinstance(part, TextDelta) and part.finish_reason
        } == {0, 1}
    assert texts(parts, 2) == ["one 漢字 😀 漢", "two 😀 and "]


def test_a_stop_string_and_its_tokens_are_never_shown(redis_url: str, tokenizer: Tokenizer) -> None:
    job = builders.job(sampling=SamplingParams(max_tokens=50, stop=("capital of",), logprobs=1))
    ids = tuple(tokenizer.encode("the capital of"))
    logprobs = tuple(-float(n) for n in range(len(ids)))
    top = tuple(((token, logprob),) for token, logprob in zip(ids, logprobs, strict=True))
    events = [
        TokenEvent(
            n,
            ids[n : n + 1],
            logprobs[n : n + 1],
            top[n : n + 1],
            finish_reason=STOP if n == len(ids) - 1 else None,
        )
        for n in range(len(ids))
    ]

    parts = followed(redis_url, tokenizer, job, events, outcome(job, JobState.DONE, STOP))

    assert texts(parts)[0].strip() == "the"
    deltas = [part for part in parts if isinstance(part, TextDelta)]
    shown = [token_id for delta in deltas for token_id in delta.token_ids]
    assert [logprob for delta in deltas for logprob in delta.logprobs] == list(logprobs[: len(shown)])
    assert 0 < len(shown) < len(ids)
    assert "capital" not in "".join(map(tokenizer.token_text, shown))


def test_a_choice_that_was_cut_off_shows_what_it_has(redis_url: str, tokenizer: Tokenizer) -> None:
    job = builders.job(sampling=SamplingParams(max_tokens=50, stop=("two three",)))
    event = TokenEvent(0, tuple(tokenizer.encode("one two")))

    parts = followed(
        redis_url, tokenizer, job, [event], outcome(job, JobState.CANCELLED, FinishReason.CANCELLED)
    )

    assert texts(parts)[0].strip() == "one two"


def test_a_job_that_failed_ends_with_its_outcome_alone(redis_url: str, tokenizer: Tokenizer) -> None:
    job = builders.job()
    end = outcome(job, JobState.FAILED, FinishReason.ERROR)

    parts = followed(redis_url, tokenizer, job, [TokenEvent(0, tuple(tokenizer.encode("one")))], end)

    assert not any(isinstance(part, TextDelta) and part.finish_reason for part in parts)
    assert parts[-1] == end


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
def test_calls_are_parsed_out_of_the_text_and_end_the_turn(play, stream: bool) -> None:
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


def test_an_answer_and_a_tools_result_can_be_sent_back(play) -> None:
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
def test_text_that_is_no_call_stays_content(play, text: str) -> None:
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


WRONG = "<tool_call>[1]</tool_call>"
PARTS = st.sampled_from(
    [
        "<think>hm</think>",
        "Well. ",
        ADD,
        TWICE,
        "and <tool",
        "_call>",
        WRONG,
        "</think>",
        "<",
        "\n",
        "</tool_call>",
    ]
)


@given(st.lists(PARTS, max_size=8), st.data())
def test_pieces_of_any_size_are_parsed_alike(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=9)))

    def parsed(pieces: Iterable[str]) -> ParsedAnswer:
        parser = AnswerParser(RESPONSE, "<|user|>x<|assistant|>", TOOLS)
        return joined([*(parser.push(piece) for piece in pieces), parser.finish()])

    whole = parsed([text])

    assert parsed(text[a:b] for a, b in pairwise([0, *cuts, len(text)])) == whole
    assert len(whole.content) + len(whole.reasoning) <= len(text)


def test_calls_before_a_faulty_one_arrive_and_the_faulty_one_is_text() -> None:
    parser = AnswerParser(RESPONSE, "<|user|>x<|assistant|>", TOOLS)

    found = joined((parser.push(f"<think>hm</think>Well. {ADD}and{TWICE}{WRONG} x"), parser.finish()))

    assert found.reasoning == "hm"
    assert [call.name for call in found.tool_calls] == ["add", "add"]
    assert found.content == f"Well. and{WRONG} x"


@pytest.mark.parametrize("arguments", ["", ', "arguments": null', ', "arguments": {}', ', "arguments": ""'])
def test_a_call_without_arguments_has_an_empty_object(arguments: str) -> None:
    parser = AnswerParser(RESPONSE, "<|user|>x<|assistant|>", TOOLS)

    (call,) = parser.push(f'<tool_call>{{"name": "add"{arguments}}}</tool_call>').tool_calls

    assert call == ToolCall("add", "{}")


@pytest.mark.parametrize(
    ("opened", "text", "reasoning", "content"),
    [
        ("<think>", "hm</think>Hi", "hm", "Hi"),
        ("<think>\n", "hm", "hm", ""),
        ("<think></think>", "Hi </think>", "", "Hi </think>"),
        ("", "Hi", "", "Hi"),
    ],
)
def test_a_thought_is_open_where_the_prompt_opened_it(
    opened: str, text: str, reasoning: str, content: str
) -> None:
    parser = AnswerParser(RESPONSE, f"<|user|><think>x</think><|assistant|>{opened}", TOOLS)

    found = joined((parser.push(text), parser.finish()))

    assert (found.reasoning, found.content) == (reasoning, content)


def test_letters_that_spell_the_tokens_between_parts_are_text(tmp_path: Path) -> None:
    shutil.copytree(built_in_folder("azu/tiny-dense"), tmp_path / "model")
    spelled = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    whole = AutoTokenizer.from_pretrained(tmp_path / "model")
    whole.add_tokens(spelled)
    whole.response_template = RESPONSE
    whole.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"response_template": RESPONSE}))
    tokenizer = Tokenizer(tmp_path / "model")
    opened, closed, call, called = whole.convert_tokens_to_ids(spelled)

    def letters(text: str) -> list[int]:
        return [token_id for letter in text for token_id in whole(letter)["input_ids"]]

    def parsed(ids: list[int]) -> ParsedAnswer:
        prompt = [
            *letters("<|assistant|><think>"),
            *whole.convert_tokens_to_ids(["<|assistant|>", "<think>"]),
        ]
        parser = tokenizer.answer_parser(prompt, TOOLS)
        assert parser is not None
        text = tokenizer.completion(prompt, SamplingParams(max_tokens=99), tokenizer.markup)
        shown = [*(text.push(token_id).text for token_id in ids), text.finish().text]
        return joined([*map(parser.push, shown), parser.finish()])

    found = parsed(
        [
            *letters("a </think> b"), closed, *letters(f"Say {ADD}."), call,
            *letters('{"name": "add", "arguments": {"a": "'), opened, *letters('<tool_call>"}}'), called, 2,
        ]
    )  # fmt: skip

    assert found.reasoning == "a </think> b"
    assert found.content == f"Say {ADD}."
    assert found.tool_calls == (ToolCall("add", '{"a": "<think><tool_call>"}'),)


def test_a_stream_that_is_taken_up_again_has_the_chunks_of_the_first(play) -> None:
    async def scenario(client: openai.AsyncOpenAI, model: str) -> None:
        async def chunks(response: Any) -> list[dict[str, Any]]:
            return [
                json.loads(line.removeprefix("data: ")) | {"created": 0}
                async for line in response.aiter_lines()
                if line.startswith("data: {")
            ]

        asked = {"model": model, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 200, "n": 2}
        options = {"include_usage": True, "include_receipt": True}
        body = asked | {"stream": True, "stream_options": options}
        http = client._client
        async with http.stream(
            "POST", "/v1/chat/completions", json=body, headers=client.auth_headers
        ) as first:
            whole = await chunks(first)
        job_id = whole[0]["azu"]["job_id"]
        parts = {name for chunk in whole for one in chunk["choices"] for name in one["delta"]}
        assert parts == {"role", "content", "reasoning_content", "tool_calls"}
        for seen in sorted({*range(0, len(whole), 7), *range(len(whole) - 6, len(whole))}):
            after = max(chunk["azu"].get("after") or 0 for chunk in whole[: seen + 1])
            has_end = whole[seen]["choices"] and whole[seen]["choices"][0]["finish_reason"]
            if has_end or whole[seen]["azu"].get("after") is None:
                continue
            query = {"chat": True, "after": after}
            async with http.stream(
                "GET", f"/v1/jobs/{job_id}/stream", params=query, headers=client.auth_headers
            ) as rest:
                assert await chunks(rest) == (whole[seen + 1 :] if after else whole), after

    play(scenario, f"<think>hm</think>Let me see. {ADD}{TWICE}")


@pytest.mark.parametrize("stream", [False, True])
def test_without_tools_a_thought_is_told_apart_and_a_quoted_call_is_content(play, stream: bool) -> None:
    async def scenario(client: openai.AsyncOpenAI, model: str) -> None:
        asked = {"model": model, "messages": MESSAGES, "max_tokens": 200}
        if stream:
            deltas = [
                chunk.choices[0].delta
                async for chunk in await client.chat.completions.create(**asked, stream=True)
            ]
            content = "".join(delta.content or "" for delta in deltas)
            thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
            assert not any(delta.tool_calls for delta in deltas)
        else:
            message = (await client.chat.completions.create(**asked)).choices[0].message
            content, thought = message.content, message.reasoning_content
            assert not message.tool_calls
        assert (thought, content) == ("hm", f"Use {ADD}")

    play(scenario, f"<think>hm</think>Use {ADD}")


@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_that_was_cut_off_ends_with_length_also_behind_a_call(play, stream: bool) -> None:
    async def scenario(client: openai.AsyncOpenAI, model: str) -> None:
        asked = {"model": model, "messages": MESSAGES, "tools": TOOLS, "max_tokens": len(spoken(TWICE)) + 1}
        if stream:
            chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
            calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = (await client.chat.completions.create(**asked)).choices[0]
            calls, reason = choice.message.tool_calls, choice.finish_reason
        assert [call.function.name for call in calls] == ["add"]
        assert reason == "length"

    play(scenario, f"{TWICE} and more and more and more")


@pytest.mark.parametrize(
    "template", [{}, {"fields": 7}, {"start_anchor": "x", "fields": {"content": {"open": 7}}}]
)
def test_a_malformed_response_template_is_a_broken_checkpoint(template: dict[str, object]) -> None:
    with pytest.raises(BrokenCheckpoint):
        AnswerParser(template, "", TOOLS)
