"""Text of others acts on nothing that shows it, and stays readable."""

import json

import pytest

from azu.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone\x07", "\\u001b[2Jgone\\u0007"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x7f\x9b31m", "\\u007f\\u009b31m"),
        ("admin\u202etxt\u2066", "admin\\u202etxt\\u2066"),
        ("a\u2028b\ufeff\u200b", "a\\u2028b\\ufeff\\u200b"),
        ("half \ud83d", "half \\ud83d"),
        ("\U000e0041", "\\udb40\\udc41"),
        ("Zo\u00eb \u5de5\u5320 \U0001f469\u200d\U0001f527 \u0645\u06cc\u200c\u0634\u0648\u062f", None),
    ],
)
def test_what_acts_is_escaped_and_all_else_stays(text: str, shown: str | None) -> None:
    assert printable(text) == (text if shown is None else shown)
    assert printable(printable(text)) == printable(text)
    assert json.loads(f'"{printable(text)}"') == text


def test_a_text_is_bounded_also_by_what_its_escapes_add() -> None:
    assert printable("x" * 9, 8) == "x" * 7 + "\u2026"
    assert printable("x" * 8, 8) == "x" * 8
    assert len(printable("\x1b" * 8, 8)) == 8


def test_what_is_kept_stays() -> None:
    assert printable("a\nb\x1b", kept="\n") == "a\nb\\u001b"
