"""Every error has an HTTP status and body, and keeps its values across a process border."""

import pickle

import pytest
from pydantic import TypeAdapter, ValidationError

from azu.errors import AzuError, error_classes, plain_fault, plain_reason

# Classes of other files may have a constructor of their own; the tests beside them cover them.
CLASSES = [error_class for error_class in error_classes() if error_class.__module__ == AzuError.__module__]


@pytest.mark.parametrize("error_class", CLASSES)
def test_an_error_becomes_openais_error_body(error_class: type[AzuError]) -> None:
    body = error_class("what is wrong", param="model").to_openai()["error"]

    assert body["message"] == "what is wrong"
    assert body["param"] == "model"
    assert set(body) == {"message", "type", "param", "code"}
    assert 400 <= error_class.status < 600


@pytest.mark.parametrize("error_class", CLASSES)
def test_an_error_keeps_its_values_across_a_process_border(error_class: type[AzuError]) -> None:
    sent = error_class("what is wrong", param="model", code="special")

    arrived = pickle.loads(pickle.dumps(sent))

    assert type(arrived) is error_class
    assert (arrived.message, arrived.param, arrived.code) == ("what is wrong", "model", "special")


def test_an_error_that_quotes_others_acts_on_nothing_wherever_it_comes_from() -> None:
    made = AzuError("no model \x1b[2J" + "x" * 9_000, param="\x9bmodel")
    crafted = AzuError("")
    crafted.__dict__.update(message="node \x1b[2J" + "x" * 9_000, param="\x9bmodel")
    for error in (made, pickle.loads(pickle.dumps(crafted))):
        assert "\x1b" not in error.message + str(error)
        assert len(error.message) == 4096
        assert error.param == "\\u009bmodel"


def test_no_two_classes_share_a_code() -> None:
    codes = [
        error_class.__dict__["default_code"]
        for error_class in error_classes()
        if "default_code" in error_class.__dict__
    ]

    assert len(codes) == len(set(codes))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("the width 65 is no multiple of 4"), "the width 65 is no multiple of 4"),
        (
            ValueError("Fault of a class:\n    TypeError: Field 'width' expected int"),
            "Field 'width' expected int",
        ),
        (KeyError("Missing key in `rope`"), "Missing key in 'rope'"),
        (KeyError("silu"), "something"),
        (RuntimeError("Cannot copy out of meta tensor; no data!"), "something"),
        (TypeError("LlamaRotaryEmbedding.forward() missing 1 argument"), "something"),
        (ValueError(""), "something"),
    ],
)
def test_a_librarys_reason_is_shown_in_plain_words_or_not_at_all(error: Exception, words: str) -> None:
    assert plain_reason(error, "something") == words


def test_a_fault_has_the_place_that_a_caller_knows() -> None:
    adapter = TypeAdapter(dict[str, list[int] | list[dict[str, bool]]])
    with pytest.raises(ValidationError) as refused:
        adapter.validate_python({"a": [{"b": 7}]})

    place, words = plain_fault(refused.value.errors())

    assert place == "a.0.b"
    assert words == "Input should be a valid boolean, unable to interpret input"
