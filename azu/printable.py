"""Text that others wrote, for terminals, logs and messages: nothing in it acts on what shows it."""

import json
import re

# What moves the cursor, colours, rings or ends a line; what turns the direction of writing; what is not seen;
# and halves of characters, which no file can hold.
_ACTING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)
_CUT = "…"


def printable(text: str, most: int | None = None, *, kept: str = "") -> str:
    r"""Return a text with each acting character escaped as in JSON, such as \u001b, and at most `most` long.

    The characters `kept` stay as they are.
    """
    if most is not None and len(text) > most:
        text = text[: most - 1] + _CUT
    cleaned = _ACTING.sub(lambda found: _escaped(found[0], kept), text)
    return cleaned if most is None or len(cleaned) <= most else cleaned[: most - 1] + _CUT


def _escaped(character: str, kept: str) -> str:
    return character if character in kept else json.dumps(character)[1:-1]
