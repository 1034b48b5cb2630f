"""Values and bytes with one change, for tests that send damaged input."""

import random

# Replacements for a value: other types and sizes, and input that parsers often fail on.
STRANGE = (
    None, True, -1, 0, 2**63, 10**400, 1e308, float("nan"), "", "\0", "x" * 5000, "../../etc/passwd", [],
    [[]], {}, {"a": {"b": []}}, "😀", "0x" + "f" * 40, "2001-99-99", "1_000", "=", "~",
)  # fmt: skip


def mutated_value(value: object, chance: random.Random) -> object:
    """Return the value with one change inside."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        kind = chance.random()
        if kind < 0.1:
            return {other: kept for other, kept in value.items() if other != key}
        if kind < 0.2:
            return value | {f"{key}_": value[key]}
        return value | {key: mutated_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        place = chance.randrange(len(value))
        return [*value[:place], mutated_value(value[place], chance), *value[place + 1 :]]
    return chance.choice(STRANGE)


def mutated_bytes(content: bytes, chance: random.Random) -> bytes:
    """Return the bytes cut, with bytes added or removed, doubled, or replaced by nested input."""
    at = chance.randrange(len(content) + 1)
    match chance.randrange(5):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + chance.randbytes(chance.randrange(1, 9)) + content[at:]
        case 2:
            return content[:at] + content[at + 1 :]
        case 3:
            return content[:at] + content
        case _:
            return chance.choice((b"[", b"{'a':", b'{"a":', b"- ", b"&a [*a, ", b"!!python/none ")) * 1200
