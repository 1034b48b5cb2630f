"""A ticket reads back from its word, and a damaged word is refused."""

import base64
import json

import pytest

from azu.errors import ConfigurationError
from azu.launch.membership import EnrolmentTicket, Ticket, decode_ticket

TICKET = Ticket(address="192.0.2.7:6379", token="ab" * 32, network="cd" * 16)
ENROLMENT = EnrolmentTicket(url="https://192.0.2.7:8000", network="cd" * 16, secret="ef" * 32)


def encoded(**fields: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()


@pytest.mark.parametrize("ticket", [TICKET, ENROLMENT])
def test_a_ticket_is_one_word_that_reads_back(ticket: Ticket | EnrolmentTicket) -> None:
    word = ticket.encode()

    assert word.split() == [word]
    assert decode_ticket(f" {word}\n") == ticket


def test_repr_shows_no_secret() -> None:
    assert TICKET.token not in repr(TICKET)
    assert ENROLMENT.secret not in repr(ENROLMENT)


@pytest.mark.parametrize(
    "word",
    [
        "",
        "hello",
        "häh",
        TICKET.encode()[:-4],
        TICKET.encode()[4:],
        encoded(address="192.0.2.7:6379"),
        encoded(address="192.0.2.7:6379", token="ab" * 32, network="cd" * 16, version=2),
        encoded(address="192.0.2.7:6379", token="ab" * 32, network="cd" * 16, version=1, more=1),
        encoded(address="192.0.2.7", network="cd" * 16, token="ab" * 32, version=1),
        encoded(address="192.0.2.7:6379 --head", network="cd" * 16, token="ab" * 32, version=1),
        encoded(address="192.0.2.7:6379", network="cd" * 16, token="../../etc/passwd", version=1),
        encoded(url="http://192.0.2.7:8000", network="cd" * 16, secret="ef" * 32, version=2),
        encoded(url="https://192.0.2.7:8000", network="cd" * 16, secret="ef", version=2),
        encoded(url="https://192.0.2.7:8000", network="cd" * 16, version=2),
    ],
)
def test_a_damaged_ticket_is_refused(word: str) -> None:
    with pytest.raises(ConfigurationError, match="damaged"):
        decode_ticket(word)
