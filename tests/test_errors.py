"""Every error has an HTTP status and body, and keeps its values across a process border."""

import pickle

import pytest

from azu.errors import AzuError, error_classes

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


def test_no_two_classes_share_a_code() -> None:
    codes = [
        error_class.__dict__["default_code"]
        for error_class in error_classes()
        if "default_code" in error_class.__dict__
    ]

    assert len(codes) == len(set(codes))
