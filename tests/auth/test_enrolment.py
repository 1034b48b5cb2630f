"""A ticket admits machines of its range, each for its own address, until it ends or is revoked."""

import asyncio
import json
import random
from collections.abc import Awaitable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import pytest
from cryptography import x509

from azu.auth import enrolment
from azu.auth.certificates import (
    Authority,
    hosts_of,
    key_digest,
    new_key,
    new_node_id,
    new_request,
    payout_text,
    public_key,
    read_certificate,
    renewal_text,
    sign_text,
)
from azu.auth.enrolment import Enrolment, forget_members
from azu.auth.tickets import Admission, NodeCertificate
from azu.errors import (
    AzuError,
    ConfigurationError,
    Forbidden,
    InvalidRequest,
    NotFound,
    Unauthenticated,
    Unavailable,
)

T = TypeVar("T")
HEAD = "10.0.0.1"
ADA, BEN = "10.0.0.7", "10.0.0.8"
RANGE = "10.0.0.0/24"
LIFE = timedelta(days=7)
START = datetime(2026, 11, 1, 12, tzinfo=UTC)


def done(awaited: Awaitable[T]) -> T:
    async def run() -> T:
        return await awaited

    return asyncio.run(run())


@dataclass
class Books:
    """The books' part in enrolment, over their folder; the clock is set by hand."""

    folder: Path
    makes_none: str = ""
    now: datetime = START
    enrolment: Enrolment = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        admission = Admission(LIFE.total_seconds(), (HEAD, "fe80::1", "0.0.0.0"), self.makes_none)
        self.enrolment = Enrolment(
            self.folder, admission, now=lambda: self.now, random_bytes=random.Random(5).randbytes
        )

    def ticket(self, host: str = RANGE, uses: int = 1, expires_in_s: int = 3600) -> str:
        secret, _ = done(self.enrolment.new_ticket("lab", uses, host, expires_in_s))
        # Each ticket has another secret, also after a restart.
        self.enrolment._random_bytes = random.Random(secret).randbytes
        return secret

    def enrol(
        self, secret: str, host: str = ADA, key: bytes | None = None, name: str = "ada"
    ) -> NodeCertificate:
        return done(self.enrolment.enrol(secret, name, host, new_request(key or new_key()).decode()))

    def renew(self, certificate: str, key: bytes) -> NodeCertificate:
        at_ms = round(self.now.timestamp() * 1000)
        return done(self.enrolment.renew(certificate, at_ms, sign_text(key, renewal_text(at_ms))))

    def revoke(self) -> None:
        (record, *_) = done(self.enrolment.tickets())
        done(self.enrolment.revoke_ticket(record.ticket_id))


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(tmp_path / "books")


def parsed(signed: NodeCertificate) -> x509.Certificate:
    return read_certificate(signed.certificate.encode())


def test_a_ticket_gives_a_certificate_for_the_machines_own_key_and_address(books: Books) -> None:
    key = new_key()

    certificate = parsed(books.enrol(books.ticket(), key=key))

    assert hosts_of(certificate) == {ADA, "127.0.0.1"}
    assert certificate.not_valid_after_utc == START + LIFE
    request = x509.load_pem_x509_csr(new_request(key))
    assert key_digest(public_key(certificate)) == key_digest(public_key(request))


@pytest.mark.parametrize(
    "host", [HEAD, "::ffff:10.0.0.1", "fe80::1", "127.0.0.1", "::1", "0.0.0.0", "224.0.0.1"]
)
@pytest.mark.parametrize("ticket", ["0.0.0.0/0", "::/0"])
def test_no_certificate_is_given_for_the_heads_addresses(books: Books, ticket: str, host: str) -> None:
    with pytest.raises(Forbidden) as refused:
        books.enrol(books.ticket(ticket), host)

    assert refused.value.param == "host"
    assert done(books.enrolment.tickets())[0].nodes == {}


@pytest.mark.parametrize(
    ("ticket", "host"), [(ADA, BEN), (RANGE, "10.0.1.7"), (RANGE, "fd00::7"), ("10.0.0.8/31", ADA)]
)
def test_no_certificate_is_given_for_an_address_that_the_ticket_is_not_for(
    books: Books, ticket: str, host: str
) -> None:
    with pytest.raises(Forbidden, match="this ticket is for"):
        books.enrol(books.ticket(ticket), host)


@pytest.mark.parametrize("host", ["", "ada.example", "10.0.0.7/24/1", "10.0.0.256"])
def test_a_ticket_is_for_addresses(books: Books, host: str) -> None:
    with pytest.raises(InvalidRequest):
        books.ticket(host)
    with pytest.raises(InvalidRequest):
        books.enrol(books.ticket(), host or "x")


def test_an_earlier_address_of_a_node_is_not_played_again(books: Books) -> None:
    key, paid = new_key(), list[str]()
    certificate = books.enrol(books.ticket(), key=key)
    node = new_node_id(key_digest(public_key(parsed(certificate))))

    async def pays(_: str, payout: str, **given: object) -> None:
        paid.append(payout)

    def set_payout(payout: str, ago_ms: int) -> None:
        at_ms = round(books.now.timestamp() * 1000) - ago_ms
        signature = sign_text(key, payout_text(node, payout, "ada", 0, at_ms))
        done(books.enrolment.set_payout(certificate.certificate, node, payout, "ada", 0, at_ms, signature))

    books.enrolment.pays = pays
    set_payout("old", 2)
    for _ in range(2):
        set_payout("new", 1)
    for payout, ago_ms in (("old", 2), ("old", 1)):
        with pytest.raises(Unauthenticated, match="another address"):
            set_payout(payout, ago_ms)
    assert paid == ["old", "new", "new"]


def test_one_key_gets_no_certificate_for_a_second_address(books: Books) -> None:
    """Else a machine with a ticket for a range could collect certificates for all of it."""
    secret, key = books.ticket(uses=5), new_key()
    books.enrol(secret, ADA, key)

    with pytest.raises(Forbidden, match=f"as {ADA}"):
        books.enrol(secret, BEN, key)


def test_a_ticket_admits_its_number_of_machines_and_each_again(books: Books) -> None:
    secret, key = books.ticket(uses=2), new_key()
    books.enrol(secret, ADA, key)
    books.enrol(secret, BEN, name="ben")

    books.enrol(secret, ADA, key)
    with pytest.raises(Unauthenticated, match="used up"):
        books.enrol(secret, "10.0.0.9", name="cleo")
    (record,) = done(books.enrolment.tickets())
    assert sorted((node.name, node.host) for node in record.nodes.values()) == [("ada", ADA), ("ben", BEN)]


def test_an_expired_and_an_unknown_ticket_admit_no_machine(books: Books) -> None:
    secret = books.ticket(expires_in_s=60)
    books.now += timedelta(seconds=60)

    with pytest.raises(Unauthenticated, match="expired"):
        books.enrol(secret)
    with pytest.raises(Unauthenticated, match="unknown"):
        books.enrol("0" * 64)


def test_a_revoked_ticket_admits_and_renews_no_machine(books: Books) -> None:
    secret, key = books.ticket(uses=5), new_key()
    signed = books.enrol(secret, ADA, key)

    books.revoke()

    for act in (
        lambda: books.enrol(secret, BEN),
        lambda: books.enrol(secret, ADA, key),
        lambda: books.renew(signed.certificate, key),
    ):
        with pytest.raises(Unauthenticated, match="revoked"):
            act()
    with pytest.raises(NotFound):
        done(books.enrolment.revoke_ticket("ticket-0000000000000000"))
    # With another ticket it is admitted again.
    assert books.renew(books.enrol(books.ticket(), ADA, key).certificate, key)


def test_a_renewed_certificate_is_for_the_same_key_and_address(books: Books) -> None:
    key = new_key()
    first = books.enrol(books.ticket(), ADA, key)
    books.now += timedelta(days=5)

    later = parsed(books.renew(first.certificate, key))

    assert hosts_of(later) == {ADA, "127.0.0.1"}
    assert key_digest(public_key(later)) == key_digest(public_key(parsed(first)))
    assert later.not_valid_after_utc == books.now + LIFE


def test_a_certificate_that_has_ended_is_not_renewed(books: Books) -> None:
    key = new_key()
    first = books.enrol(books.ticket(), ADA, key)
    books.now += LIFE

    with pytest.raises(Unauthenticated, match="ended"):
        books.renew(first.certificate, key)


def test_another_key_or_network_renews_nothing(books: Books, tmp_path: Path) -> None:
    key, other = new_key(), Books(tmp_path / "other")
    mine, others = books.enrol(books.ticket(), ADA, key), other.enrol(other.ticket(), ADA, key)

    with pytest.raises(Unauthenticated, match="not signed"):
        books.renew(mine.certificate, new_key())
    with pytest.raises(Unauthenticated, match="not of this network"):
        books.renew(others.certificate, key)


def test_a_head_that_took_a_nodes_address_renews_no_certificate_for_it(books: Books) -> None:
    key = new_key()
    first = books.enrol(books.ticket(), ADA, key)
    admission = Admission(LIFE.total_seconds(), (ADA,))
    books.enrolment = Enrolment(books.folder, admission, now=lambda: books.now)

    with pytest.raises(Forbidden):
        books.renew(first.certificate, key)


def test_tickets_and_nodes_outlast_a_restart(books: Books) -> None:
    key = new_key()
    used, unused = books.ticket(), books.ticket()
    first = books.enrol(used, ADA, key)

    books.restart()

    books.renew(first.certificate, key)
    books.enrol(unused, BEN)
    with pytest.raises(Unauthenticated, match="used up"):
        books.enrol(used, "10.0.0.9")


def test_no_ticket_and_no_certificate_of_before_counts_after_a_rotation(books: Books) -> None:
    key = new_key()
    used, unused = books.ticket(), books.ticket()
    first = books.enrol(used, ADA, key)

    forget_members(books.folder)
    books.restart()

    with pytest.raises(Unauthenticated, match="unknown"):
        books.enrol(unused, BEN)
    with pytest.raises(Unauthenticated, match="not of this network"):
        books.renew(first.certificate, key)
    assert books.enrol(books.ticket(), ADA, key).authority != first.authority


def test_where_a_member_could_take_the_money_no_ticket_is_made(tmp_path: Path) -> None:
    books = Books(tmp_path / "books")
    key = new_key()
    first = books.enrol(books.ticket(), ADA, key)
    books.makes_none = "one user runs it all"
    books.restart()

    with pytest.raises(Forbidden, match="one user runs it all"):
        books.ticket()
    # A machine that was admitted before stays.
    assert books.renew(first.certificate, key)


def test_what_ended_is_forgotten_and_the_rest_has_a_bound(books: Books) -> None:
    old, key = books.ticket(), new_key()
    books.enrol(old, ADA, key)
    books.ticket(expires_in_s=60)
    books.now += timedelta(hours=2)
    books.ticket()
    assert len(done(books.enrolment.tickets())) == 2  # the old one's node still has a certificate

    books.now += LIFE
    books.ticket()
    assert len(done(books.enrolment.tickets())) == 1
    (record,) = done(books.enrolment.tickets())
    books.enrolment._records = {f"ticket-{number}": record for number in range(1000)}
    with pytest.raises(Forbidden, match="1000 tickets"):
        books.ticket()


def test_the_secret_is_not_on_the_disk(books: Books) -> None:
    secret = books.ticket()
    books.enrol(secret)

    assert all(secret not in file.read_text() for file in books.folder.iterdir())
    assert all(file.stat().st_mode & 0o077 == 0 for file in books.folder.glob("*.key"))


@pytest.mark.parametrize("content", ["", "{", "[1]", json.dumps([{"ticket_id": "x"}])])
def test_a_damaged_file_is_refused_by_name(books: Books, content: str) -> None:
    (books.folder / "tickets.json").write_text(content)

    with pytest.raises(ConfigurationError, match=r"tickets\.json is damaged"):
        books.restart()


def test_a_disk_that_fails_admits_no_machine(books: Books) -> None:
    secret = books.ticket()
    kept = (books.folder / "tickets.json").read_text()
    (books.folder / ".tickets.json.part").mkdir()

    with pytest.raises(Unavailable):
        books.enrol(secret)
    assert (books.folder / "tickets.json").read_text() == kept
    (books.folder / ".tickets.json.part").rmdir()
    books.enrol(secret)


def test_odd_requests_are_refused_with_a_typed_error(books: Books) -> None:
    secret = books.ticket()
    for request in ("", "hello", Authority.new("x", START).pem.decode()):
        with pytest.raises(AzuError):
            done(books.enrolment.enrol(secret, "ada", ADA, request))
        with pytest.raises(AzuError):
            done(books.enrolment.renew(request, 1, "00"))


def test_a_ticket_that_was_revoked_or_has_expired_makes_room(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "_MAX_TICKETS", 2)
    for _ in range(2):
        books.ticket()
    with pytest.raises(Forbidden, match="revoke some"):
        books.ticket()

    first, _ = done(books.enrolment.tickets())
    done(books.enrolment.revoke_ticket(first.ticket_id))
    books.ticket()

    books.now += timedelta(hours=2)
    books.ticket()
