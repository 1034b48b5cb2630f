"""A ticket reads back from its word, and a damaged word is refused."""

import base64
import json
import socket
from dataclasses import asdict
from pathlib import Path

import pytest

from azu.auth.certificates import read_certificate
from azu.errors import ConfigurationError, OtherVersion
from azu.launch.membership import (
    EnrolmentTicket,
    Ticket,
    decode_ticket,
    head_files,
    members_folder,
    membership_of,
)
from azu.protocol.versions import Versions

TICKET = Ticket(port=6379, token="ab" * 32, network="cd" * 16)
ENROLMENT = EnrolmentTicket(
    url="https://192.0.2.7:8000", network="cd" * 16, secret="ef" * 32, host="192.0.2.0/24"
)


def encoded(**fields: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()


def enrolment(**changed: object) -> dict[str, object]:
    return ENROLMENT.model_dump() | changed


@pytest.mark.parametrize("ticket", [TICKET, ENROLMENT])
def test_a_ticket_is_one_word_that_reads_back(ticket: Ticket | EnrolmentTicket) -> None:
    word = ticket.encode()

    assert word.split() == [word]
    assert decode_ticket(f" {word}\n") == ticket


OLD, NEW = Versions(0, 0, "0.0"), Versions(10**6, 10**6, "9.0")


def test_a_machine_that_is_too_old_for_a_tickets_network_is_told_what_to_install() -> None:
    for ticket in (TICKET, ENROLMENT):
        later = ticket.model_copy(update={"versions": NEW})
        with pytest.raises(OtherVersion, match=r"too old .* install azu 9\.0"):
            decode_ticket(later.encode())
    # Also where this release cannot read the rest of the ticket.
    with pytest.raises(OtherVersion, match=r"install azu 9\.0"):
        decode_ticket(encoded(version=3, versions=asdict(NEW), form="of a later release"))


def test_only_a_network_that_is_not_asked_later_refuses_a_newer_machine_by_its_ticket() -> None:
    with pytest.raises(OtherVersion, match=r"too new .* install azu 0\.0"):
        decode_ticket(TICKET.model_copy(update={"versions": OLD}).encode())
    # This network may be of a later release than the ticket: it is asked when the machine enrols.
    earlier = ENROLMENT.model_copy(update={"versions": OLD})
    assert decode_ticket(earlier.encode()) == earlier


def test_a_ticket_without_encryption_names_no_other_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        ticket = TICKET.model_copy(update={"port": head.getsockname()[1]})
        access = membership_of(ticket, Path("home"), name="ada", host="127.0.0.1").access()

    assert access.head == f"127.0.0.1:{ticket.port}"
    assert access.life is None


def test_the_head_shows_clients_and_nodes_certificates_of_two_authorities(tmp_path: Path) -> None:
    files = head_files(tmp_path, ["192.0.2.1"])

    assert files.ray.authority.read_bytes() != files.ingress.authority.read_bytes()
    for shown in (files.ray, files.ingress):
        authority = read_certificate(shown.authority.read_bytes())
        read_certificate(shown.certificate.read_bytes()).verify_directly_issued_by(authority)
        assert shown.key.stat().st_mode & 0o077 == 0
    # The authorities stay at the next start, and their keys lie with the books.
    again = head_files(tmp_path, ["192.0.2.1"])
    assert again.ray.authority.read_bytes() == files.ray.authority.read_bytes()
    assert again.ingress.authority.read_bytes() == files.ingress.authority.read_bytes()
    assert {path.name for path in tmp_path.rglob("*.key")} == {
        "node.key", "ingress.key", "nodes.key"
    }  # fmt: skip
    assert {path.name for path in members_folder(tmp_path).glob("*.key")} == {"nodes.key", "ingress.key"}


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
        encoded(port=6379),
        encoded(port=6379, token="ab" * 32, network="cd" * 16, version=2),
        encoded(port=6379, token="ab" * 32, network="cd" * 16, version=1, more=1),
        encoded(port=0, token="ab" * 32, network="cd" * 16, version=1),
        encoded(port="6379 --head", token="ab" * 32, network="cd" * 16, version=1),
        encoded(port=6379, token="../../etc/passwd", network="cd" * 16, version=1),
        encoded(port=6379, token="ab" * 32, network="cd" * 16, version=1, address="192.0.2.7:6379"),
        encoded(**enrolment(url="http://192.0.2.7:8000")),
        encoded(**enrolment(secret="ef")),
        encoded(**enrolment(network="cd")),
        encoded(**enrolment(host="anywhere")),
        encoded(**enrolment(host=None)),
    ],
)
def test_a_damaged_ticket_is_refused(word: str) -> None:
    with pytest.raises(ConfigurationError, match="damaged"):
        decode_ticket(word)
