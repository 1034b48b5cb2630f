"""A ticket survives a copy, and says so when it did not."""

import base64
import json

import pytest

from azu.cli.network.tickets import Ticket
from azu.errors import ConfigurationError

TICKET = Ticket(address="192.0.2.7:6379", token="ab" * 32)


def encoded(**fields: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()


def test_a_ticket_is_one_word_that_reads_back() -> None:
    word = TICKET.encode()

    assert word.split() == [word]
    assert Ticket.decode(f" {word}\n") == TICKET


def test_the_token_is_not_shown() -> None:
    assert TICKET.token not in repr(TICKET)


@pytest.mark.parametrize(
    "word",
    [
        "",
        "hello",
        "häh",
        TICKET.encode()[:-4],
        TICKET.encode()[4:],
        encoded(address="192.0.2.7:6379"),
        encoded(address="192.0.2.7:6379", token="ab" * 32, version=2),
        encoded(address="192.0.2.7:6379", token="ab" * 32, version=1, more=1),
        encoded(address="192.0.2.7", token="ab" * 32, version=1),
        encoded(address="192.0.2.7:6379 --head", token="ab" * 32, version=1),
        encoded(address="192.0.2.7:6379", token="../../etc/passwd", version=1),
    ],
)
def test_a_damaged_ticket_is_refused(word: str) -> None:
    with pytest.raises(ConfigurationError, match="damaged"):
        Ticket.decode(word)
