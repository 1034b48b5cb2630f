"""Every error has an HTTP face, and survives a process border."""

import pickle

import pytest

from azu.errors import AzuError, kinds

# Whoever has a kind of its own, with a constructor of its own, tests that one beside it.
KINDS = [kind for kind in kinds() if kind.__module__ == AzuError.__module__]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_itself_in_openais_shape(kind: type[AzuError]) -> None:
    body = kind("what is wrong", param="model").to_openai()["error"]

    assert body["message"] == "what is wrong"
    assert body["param"] == "model"
    assert set(body) == {"message", "type", "param", "code"}
    assert 400 <= kind.status < 600


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_crosses_a_process_border_whole(kind: type[AzuError]) -> None:
    sent = kind("what is wrong", param="model", code="special")

    arrived = pickle.loads(pickle.dumps(sent))

    assert type(arrived) is kind
    assert (arrived.message, arrived.param, arrived.code) == ("what is wrong", "model", "special")


def test_codes_name_one_kind_each() -> None:
    codes = [kind.__dict__["default_code"] for kind in kinds() if "default_code" in kind.__dict__]

    assert len(codes) == len(set(codes))
