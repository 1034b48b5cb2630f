"""Every error that a command ends with says what to type next, and what it says exists."""

import re
from pathlib import Path

import pytest

import azu
from azu.cli import advice
from azu.cli.advice import with_next_step
from azu.errors import AzuError, InvalidRequest, Unauthenticated, error_classes
from tests.test_docs import wrong_arguments

COMMAND = re.compile(r"`azu ([a-z]+)(?: ([a-z-]+))?")
TREE = Path(azu.__file__).parents[1]
# Those of other rooms never leave their process.
CLASSES = [kind for kind in error_classes() if kind.__module__ == AzuError.__module__]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_of_each_class_says_what_to_do_next(kind: type[AzuError]) -> None:
    said = with_next_step(kind("it did not work."), "prompt")

    assert said.startswith("it did not work. Next: ")
    assert len(said.splitlines()) == 1


def test_a_code_says_it_better_than_its_class_and_a_message_best() -> None:
    assert "azu jobs" in with_next_step(AzuError("no such job", code="job_not_found"), "receipt")
    assert with_next_step(InvalidRequest("too much"), "prompt").endswith("`azu prompt -h` says what it takes")
    named = "no key for http://x on this machine; run `azu login`"
    assert with_next_step(Unauthenticated(named), "prompt") == named


def test_each_code_with_advice_is_one_that_azu_raises() -> None:
    raised = "".join(
        path.read_text() for room in ("azu", "actors", "deployments") for path in (TREE / room).rglob("*.py")
        if path.name != "advice.py"
    )  # fmt: skip
    assert [code for code in advice._BY_CODE if f'"{code}"' not in raised] == []


def test_each_command_that_a_message_names_exists() -> None:
    named = {
        (first, second, str(path.relative_to(TREE)))
        for room in ("azu", "actors", "deployments")
        for path in (TREE / room).rglob("*.py")
        for first, second in COMMAND.findall(path.read_text())
    }
    assert len(named) > 50
    wrong = {one for one in named if wrong_arguments(list(filter(None, one[:2])))}
    assert wrong == set()
