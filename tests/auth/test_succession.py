"""One key of the platform replaces another only where both have signed it."""

from dataclasses import replace
from pathlib import Path

import pytest
from eth_account import Account

from azu.auth.succession import (
    is_signed_by_both,
    keep_succession,
    platforms_of,
    read_successions,
    sign_succession,
    successor_of,
)
from azu.errors import ConfigurationError

FIRST, SECOND, THIRD, THIEF = (Account.from_key(f"0x{number:064x}") for number in (1, 2, 3, 9))
A, B, C, T = (one.address.lower() for one in (FIRST, SECOND, THIRD, THIEF))


def test_a_platform_has_the_addresses_that_it_had_before() -> None:
    known = sign_succession(SECOND, THIRD), sign_succession(FIRST, SECOND)

    assert platforms_of(C, known) == (C, B, A)
    assert platforms_of(B, known) == (B, A)
    assert platforms_of(A, known) == (A,)
    assert (successor_of(A, known), successor_of(B, known), successor_of(C, known)) == (B, C, None)


def test_neither_key_alone_says_that_it_replaced_or_was_replaced() -> None:
    honest, stolen = sign_succession(FIRST, SECOND), sign_succession(THIEF, THIEF)
    for forged in (
        replace(honest, new=T, by_new=stolen.by_new),
        replace(honest, old=T, by_old=stolen.by_old),
        replace(honest, by_old=honest.by_new),
        replace(honest, by_new="0x"),
        replace(sign_succession(THIEF, SECOND), by_new=honest.by_new),
        replace(sign_succession(FIRST, THIEF), by_old=honest.by_old),
    ):
        assert not is_signed_by_both(forged)
        assert platforms_of(forged.new, [forged]) == (forged.new,)
        assert successor_of(forged.old, [forged]) is None


def test_addresses_in_a_circle_come_to_an_end() -> None:
    assert platforms_of(A, [sign_succession(FIRST, SECOND), sign_succession(SECOND, FIRST)]) == (A, B)


def test_the_file_keeps_each_once_and_is_named_where_it_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "platforms.json"
    first, second = sign_succession(FIRST, SECOND), sign_succession(SECOND, THIRD)
    assert read_successions(path) == ()
    for one in (first, second, first):
        keep_succession(path, one)
    assert read_successions(path) == (first, second)
    path.write_text("{")
    with pytest.raises(ConfigurationError, match=r"platforms\.json"):
        read_successions(path)
