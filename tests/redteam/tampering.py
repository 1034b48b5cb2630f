"""Root's own way to the ledger in Redis: each record can be read, changed and put back."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from redis import Redis

from azu.money.ledger.journal import JOURNAL, next_hash
from tests.redteam.conftest import MALLORY

Line = tuple[str, dict[str, str]]  # a number, and the entry with its hash, as Redis has them

# What each record is made to say: it brings the one who changes it money, or hides what was taken.
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "deposit": {"address": MALLORY},
    "key_opened": {"address": MALLORY},
    "node_enrolled": {"payout": MALLORY},
    "earnings_claimed": {"address": MALLORY},
    "reserve": {"max_tokens": 10**6},
    "settle": {"shares": {MALLORY: 8}},
    "withdrawal_planned": {"address": MALLORY},
    "suspended": {"sender": MALLORY},
    "journal_sealed": {"sha256": "0" * 64},
}


def lines_of(url: str) -> list[Line]:
    """Return the journal's lines in the Redis at a URL."""
    with Redis.from_url(url, decode_responses=True) as redis:
        return list(redis.xrange(JOURNAL))


def put(url: str, lines: Sequence[Line]) -> None:
    """Have the Redis at a URL hold other lines."""
    with Redis.from_url(url) as redis, redis.pipeline(transaction=True) as write:
        write.delete(JOURNAL)
        for number, fields in lines:
            write.xadd(JOURNAL, fields, id=number)
        write.execute()


def place_of(lines: Sequence[Line], kind: str) -> int:
    """Return where the last record of a kind is."""
    return max(at for at, (_, of) in enumerate(lines) if json.loads(of["entry"])["transfer"]["kind"] == kind)


def with_another(lines: Sequence[Line], at: int, line: Line) -> list[Line]:
    """Return lines with one of them replaced."""
    return [*lines[:at], line, *lines[at + 1 :]]


def changed(line: Line, changes: Mapping[str, Any]) -> Line:
    """Return a line whose transfer says something else, with the hash that it had."""
    number, fields = line
    entry = json.loads(fields["entry"])
    assert changes.keys() <= entry["transfer"].keys()
    entry["transfer"] |= changes
    text = json.dumps(entry, separators=(",", ":"))
    assert text != fields["entry"]
    return number, {**fields, "entry": text}


def rewritten(lines: Sequence[Line], owner: str, *, hides_its_end: bool) -> list[Line]:
    """Return lines in which, from the last deposit on, an owner's money is MALLORY's, with hashes that join.

    With `hides_its_end` the last line keeps the hash that it had, which the books know.
    """
    at = place_of(lines, "deposit")
    before, forged = lines[at - 1][1]["hash"], [*lines[:at]]
    for number, fields in lines[at:]:
        text = fields["entry"].replace(owner, MALLORY)
        before = next_hash(before, text)
        forged.append((number, {"entry": text, "hash": before}))
    if hides_its_end:
        number, fields = forged[-1]
        forged[-1] = number, {**fields, "hash": lines[-1][1]["hash"]}
    return forged
