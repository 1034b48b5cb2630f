"""A stream has only whole characters and no part of a stop string."""

from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer

from tests.engine.reciter import save_reciter
from tests.models.questions import built_in_folder
from tests.network.user import User

pytestmark = pytest.mark.cluster

PROMPT = "Recite:"
TEXT = " smile 😀👩‍👩‍👧 and 漢字, then <end> of it"


@pytest.fixture(scope="module")
def reciter(model_root: Path) -> str:
    return str(save_reciter(model_root / "reciter", PROMPT, TEXT))


def pieces(user: User, model: str, **asked: object) -> tuple[list[str], object]:
    client = openai.OpenAI(base_url=f"{user.url}/v1", api_key=user.api_key)
    stream = client.completions.create(
        model=model, prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **asked
    )
    chunks = list(stream)
    return [chunk.choices[0].text for chunk in chunks if chunk.choices], chunks[-1].usage


def tokens_up_to(text: str) -> int:
    """Return the number of tokens until their text contains this one."""
    tokenizer = AutoTokenizer.from_pretrained(built_in_folder("azu/tiny-dense"))
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return next(n for n in range(len(ids) + 1) if text in tokenizer.decode(ids[:n]))


@pytest.mark.prove
def test_characters_of_many_tokens_arrive_whole(user: User, reciter: str) -> None:
    found, _ = pieces(user, reciter)

    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)
    assert len([piece for piece in found if piece]) > 5


@pytest.mark.parametrize(
    "stop",
    # The second starts inside one token's text and ends inside another's.
    ["<end>", "nd 漢", ["never", "👩‍👧"]],
)
def test_a_stop_string_is_not_sent_and_ends_the_charge(
    user: User, reciter: str, stop: str | list[str]
) -> None:
    found, usage = pieces(user, reciter, stop=stop)

    complete = stop if isinstance(stop, str) else stop[-1]
    shown = TEXT[: TEXT.index(complete)]
    assert "".join(found) == shown
    assert usage.completion_tokens == tokens_up_to(complete)


def test_a_stop_string_ends_a_whole_answer_too(user: User, reciter: str) -> None:
    client = openai.OpenAI(base_url=f"{user.url}/v1", api_key=user.api_key)

    answer = client.completions.create(model=reciter, prompt=PROMPT, stop=["<end>"], logprobs=2)

    choice = answer.choices[0]
    assert choice.text == TEXT[: TEXT.index("<end>")]
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert choice.logprobs is not None
    shown = choice.logprobs.tokens or []
    assert shown
    assert "<" not in "".join(shown)
    assert len(shown) < answer.usage.completion_tokens
    job = user.results(answer.azu["job_id"])
    assert job["text"] == choice.text
