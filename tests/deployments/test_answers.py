"""Answers have OpenAI's shapes, as OpenAI's own types read them."""

from pathlib import Path

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from azu.engine.tokenizer import Tokenizer
from azu.protocol.job import FinishReason
from deployments.answers import Answer, Part, TokenScore

FOLDER = Path(__file__).parents[2] / "configs" / "models" / "tiny-dense"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(FOLDER)


def answer(tokenizer: Tokenizer, *, chat: bool) -> Answer:
    return Answer(chat=chat, job_id="job-1", model="m", created_s=7, decoder=tokenizer)


def scores(tokenizer: Tokenizer, text: str) -> tuple[TokenScore, ...]:
    ids = tokenizer.encode(text)
    offsets = [len(tokenizer.decode(ids[:index])) for index in range(len(ids))]
    return tuple(
        TokenScore(token_id, -0.5, ((token_id, -0.5), (ids[0], float("-inf"))), offset)
        for token_id, offset in zip(ids, offsets, strict=True)
    )


def test_a_streamed_chat_opens_with_its_role_and_closes_with_its_reason(tokenizer: Tokenizer) -> None:
    made = answer(tokenizer, chat=True)

    opening = made.opening(1)
    piece, closing = made.chunks(Part(1, "Hi", (), FinishReason.LENGTH))

    assert opening is not None
    first, second, last = map(ChatCompletionChunk.model_validate, (opening, piece, closing))
    assert (first.choices[0].index, first.choices[0].delta.role) == (1, "assistant")
    assert (second.choices[0].delta.content, second.choices[0].finish_reason) == ("Hi", None)
    assert last.choices[0].finish_reason == "length"
    assert made.usage_chunk({})["choices"] == []


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.CANCELLED])
def test_a_text_that_was_cut_off_by_its_reader_just_stops(tokenizer: Tokenizer, reason: FinishReason) -> None:
    whole = answer(tokenizer, chat=False).whole([Part(0, "text", (), reason)], {})

    assert whole["choices"][0]["finish_reason"] == "stop"


def test_all_choices_are_in_one_answer(tokenizer: Tokenizer) -> None:
    parts = [Part(0, "a", (), FinishReason.STOP), Part(1, "b", (), FinishReason.LENGTH)]
    counted = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}

    whole = ChatCompletion.model_validate(answer(tokenizer, chat=True).whole(parts, counted))

    assert [choice.message.content for choice in whole.choices] == ["a", "b"]
    assert [choice.finish_reason for choice in whole.choices] == ["stop", "length"]


def test_a_chats_log_probabilities_carry_the_tokens_bytes(tokenizer: Tokenizer) -> None:
    part = Part(0, "ok 😀", scores(tokenizer, "ok 😀"), FinishReason.STOP)

    (choice,) = ChatCompletion.model_validate(
        answer(tokenizer, chat=True).whole([part], {}) | {"usage": None}
    ).choices

    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert bytes(byte for token in tokens for byte in token.bytes or []).decode().endswith("ok 😀")
    assert {token.logprob for token in tokens} == {-0.5}
    assert [alternative.logprob for alternative in tokens[0].top_logprobs] == [-0.5, -9999.0]


def test_a_completions_log_probabilities_are_parallel_lists(tokenizer: Tokenizer) -> None:
    found = scores(tokenizer, "two words")
    part = Part(0, "two words", found, FinishReason.STOP)

    (choice,) = Completion.model_validate(
        answer(tokenizer, chat=False).whole([part], {}) | {"usage": None}
    ).choices

    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == [score.offset for score in found]
    assert choice.logprobs.token_logprobs == [-0.5] * len(found)
    assert len(choice.logprobs.tokens or []) == len(choice.logprobs.top_logprobs or []) == len(found)
