"""A machine gets a certificate for a ticket, only from the network that the ticket is for."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from cryptography import x509
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError

from azu.auth.certificates import key_digest, public_key, read_certificate
from azu.auth.network_id import network_id
from azu.auth.tickets import RedisTickets
from azu.client import Client
from azu.client.http import trusting
from azu.clock import wall_clock_ms
from azu.config import EnrolmentConfig
from azu.errors import AzuError, NotFound, Unauthenticated, Unavailable
from azu.launch.membership import EnrolledMembership, EnrolmentTicket, TlsFiles, authority_key, head_files
from azu.redis_client import connect_redis
from deployments import accounts, nodes
from deployments.ingress import _invalid, _refused

ADMIN_KEY = "azu-admin-key"
TOKEN = "ab" * 32
HEAD = "192.0.2.1:6379"
HOST = "192.0.2.7"
PLATFORM = "0x" + "99" * 20


@dataclass(slots=True)
class Door:
    """The ingress's routes for nodes, served over TLS with Redis behind them."""

    url: str
    files: TlsFiles
    services: SimpleNamespace

    def admin(self) -> Client:
        return Client(self.url, ADMIN_KEY, tls=trusting(self.files.authority))

    def ticket(self, uses: int = 1, expires_in_s: int = 3600) -> EnrolmentTicket:
        made = self.admin().new_ticket(label="lab", uses=uses, expires_in_s=expires_in_s)
        return EnrolmentTicket(url=made.url, network=made.network_id, secret=made.secret)

    def ticket_id(self) -> str:
        return self.admin().tickets()[-1].ticket_id


def member(ticket: EnrolmentTicket, folder: Path, name: str = "ada") -> EnrolledMembership:
    return EnrolledMembership(ticket, folder / name, name=name, host=HOST)


def certificate(folder: Path, name: str = "ada") -> x509.Certificate:
    return read_certificate(TlsFiles.of(folder / name).certificate.read_bytes())


@pytest.fixture
def door(tmp_path: Path, redis_url: str) -> Iterator[Door]:
    with serving(tmp_path / "head", redis_url) as opened:
        yield opened


class serving:  # noqa: N801 - a context, used as one
    """Serve the routes until the context is left."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        files = head_files(folder, ["127.0.0.1"])
        (folder / "ray-token").write_text(TOKEN)
        enrolment = EnrolmentConfig(
            url=url,
            head=HEAD,
            token_path=folder / "ray-token",
            authority=files.authority,
            authority_key=authority_key(folder),
        )
        api = FastAPI()
        api.include_router(nodes.router)
        api.include_router(accounts.router)
        api.add_exception_handler(AzuError, _refused)
        api.add_exception_handler(RequestValidationError, _invalid)
        digest = sha256(ADMIN_KEY.encode()).hexdigest()
        api.state.services = SimpleNamespace(
            config=SimpleNamespace(
                enrolment=enrolment,
                admin_key_sha256=digest,
                platform_address=PLATFORM,
                chain_url="",
                authority=files.authority.read_text(),
                network_id=network_id(PLATFORM, files.authority.read_text()),
            ),
            tickets=RedisTickets(connect_redis(redis_url)),
        )
        config = uvicorn.Config(api, ssl_certfile=files.certificate, ssl_keyfile=files.key, log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve([self._listener])), daemon=True
        )
        self._door = Door(url, files, api.state.services)

    def __enter__(self) -> Door:
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self._door

    def __exit__(self, *_: object) -> None:
        # Clients keep their connections open, and the server would wait for them.
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        self._listener.close()


def test_a_ticket_gives_a_certificate_and_what_opens_the_cluster(door: Door, tmp_path: Path) -> None:
    access = member(door.ticket(), tmp_path).access()

    assert (access.head, access.token) == (HEAD, TOKEN)
    names = certificate(tmp_path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert HOST in map(str, names.get_values_for_type(x509.IPAddress))
    assert access.tls is not None
    assert access.tls.key.stat().st_mode & 0o077 == 0
    assert access.tls.authority.read_bytes() == door.files.authority.read_bytes()
    assert not authority_key(tmp_path / "ada").exists()


def test_a_ticket_for_one_machine_lets_in_that_machine_alone_and_again(door: Door, tmp_path: Path) -> None:
    ticket = door.ticket()
    first = member(ticket, tmp_path)
    first.access()

    with pytest.raises(Unauthenticated, match="used up"):
        member(ticket, tmp_path, "ben").access()
    first.access()
    (line,) = door.admin().tickets()
    assert line.nodes == ("ada",)


def test_a_machine_with_a_certificate_needs_no_ticket(door: Door, tmp_path: Path) -> None:
    ticket = door.ticket()
    member(ticket, tmp_path).access()
    before = certificate(tmp_path)

    used_up = ticket.model_copy(update={"secret": "0" * 64})
    access = member(used_up, tmp_path).access()

    assert access.token == TOKEN
    after = certificate(tmp_path)
    assert after.serial_number != before.serial_number
    assert key_digest(public_key(after)) == key_digest(public_key(before))


def test_a_revoked_ticket_lets_in_and_renews_no_machine(door: Door, tmp_path: Path) -> None:
    ticket = door.ticket(uses=2)
    member(ticket, tmp_path).access()

    door.admin().revoke_ticket(door.ticket_id())

    with pytest.raises(Unauthenticated, match="revoked"):
        member(ticket, tmp_path).access()
    with pytest.raises(Unauthenticated, match="revoked"):
        member(ticket, tmp_path, "ben").access()


def test_an_expired_ticket_lets_in_no_machine(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = door.ticket(expires_in_s=60)
    monkeypatch.setattr("deployments.nodes.wall_clock_ms", lambda: wall_clock_ms() + 61_000)

    with pytest.raises(Unauthenticated, match="expired"):
        member(ticket, tmp_path).access()


def test_another_network_at_the_same_address_learns_no_secret(
    door: Door, tmp_path: Path, redis_url: str
) -> None:
    ticket = door.ticket()
    with serving(tmp_path / "impostor", redis_url) as impostor:
        lured = ticket.model_copy(update={"url": impostor.url})

        with pytest.raises(Unauthenticated, match="do not use it"):
            member(lured, tmp_path).access()
        # It shows the true authority's certificate, but the authority did not sign its own.
        config = impostor.services.config
        config.authority = door.files.authority.read_text()
        with pytest.raises(Unavailable, match="certificate"):
            member(lured, tmp_path).access()
        # It shows another platform beside the true authority.
        config.platform_address = "0x" + "66" * 20
        with pytest.raises(Unauthenticated, match="do not use it"):
            member(lured, tmp_path).access()

    member(ticket, tmp_path).access()  # the ticket is still valid


def test_a_machine_of_another_network_is_not_renewed(door: Door, tmp_path: Path, redis_url: str) -> None:
    with serving(tmp_path / "other", redis_url) as other:
        member(other.ticket(), tmp_path).access()
        stolen = TlsFiles.of(tmp_path / "ada")
    stolen.authority.write_bytes(door.files.authority.read_bytes())

    with pytest.raises(Unauthenticated):
        member(door.ticket().model_copy(update={"secret": "0" * 64}), tmp_path).access()


def test_access_is_outdated_when_the_network_moved_or_the_certificate_is_due(
    door: Door, tmp_path: Path
) -> None:
    access = member(door.ticket(), tmp_path).access()
    now = datetime.now(UTC)
    assert access.renewed_from is not None

    assert not access.is_outdated(replace(access), now)
    assert access.is_outdated(replace(access, head="192.0.2.9:6379"), now)
    assert access.is_outdated(replace(access, token="cd" * 32), now)
    assert access.is_outdated(replace(access), access.renewed_from)


def test_only_the_admin_makes_lists_and_revokes_tickets(door: Door) -> None:
    stranger = Client(door.url, "azu-sk-stranger", tls=trusting(door.files.authority))

    for call in (
        lambda: stranger.new_ticket(label="", uses=1, expires_in_s=60),
        stranger.tickets,
        lambda: stranger.revoke_ticket("ticket-0"),
    ):
        with pytest.raises(Unauthenticated, match="admin key"):
            call()
    with pytest.raises(NotFound):
        door.admin().revoke_ticket("ticket-0")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("enrol", {"secret": "x", "name": "a", "host": HOST, "request": ""}, "secret"),
        ("enrol", {"secret": "0" * 64, "name": "", "host": HOST, "request": ""}, "name"),
        ("enrol", {"secret": "0" * 64, "name": "a", "host": "ada.example", "request": ""}, "host"),
        ("enrol", {"secret": "0" * 64, "name": "a", "host": HOST, "request": "hello"}, "request"),
        ("enrol", {"secret": "0" * 64, "name": "a", "host": HOST, "request": "x" * 9000}, "request"),
        ("renew", {"certificate": "hello", "signed_at_ms": 1, "signature": "00"}, "certificate"),
        ("tickets", {"uses": 0}, "uses"),
        ("tickets", {"expires_in_s": 10**9}, "expires_in_s"),
    ],
)
def test_bad_input_is_refused_by_name(door: Door, path: str, body: dict[str, object], param: str) -> None:
    reply = httpx.post(
        f"{door.url}/v1/nodes/{path}",
        json=body,
        headers={"authorization": f"Bearer {ADMIN_KEY}"},
        verify=trusting(door.files.authority),
    )

    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
