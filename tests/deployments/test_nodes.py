"""A machine gets a certificate for a ticket, only from the network that the ticket is for."""

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import httpx
import pytest
import uvicorn
from cryptography import x509
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError

from azu.auth.certificates import (
    key_digest,
    new_key,
    public_key,
    read_certificate,
    restart_text,
    sign_text,
)
from azu.auth.enrolment import Enrolment
from azu.auth.network_id import network_id
from azu.auth.tickets import Admission, EnrolmentCalls
from azu.client.http import trusting
from azu.clock import wall_clock_ms
from azu.config import EnrolmentConfig, NodeLinks, load_network
from azu.errors import AzuError, Forbidden, OtherVersion, Unauthenticated, Unavailable
from azu.launch.membership import (
    EnrolledMembership,
    EnrolmentTicket,
    HeadFiles,
    TlsFiles,
    head_files,
    members_folder,
)
from azu.launch.processes import free_port
from azu.money.books import Members
from azu.money.books_process import ALLOWED, allowed_to
from azu.money.wire import Access, WireServer
from azu.protocol.versions import Versions, own_versions
from deployments import accounts, nodes
from deployments.ingress import _invalid, _refused
from tests.builders import ALICE, BOB

T = TypeVar("T")
TOKEN = "ab" * 32
HEAD = "192.0.2.1:6379"
HOST = "192.0.2.7"
SPEED = 7_000
LIFE_S = 7 * 86_400.0
VERSIONS = asdict(own_versions())
ENROL = {"secret": "0" * 64, "name": "a", "host": HOST, "request": "", "versions": VERSIONS}
PLATFORM = "0x" + "99" * 20


@dataclass(slots=True)
class Door:
    """The ingress's routes for nodes, served over TLS, and the books behind them, which admit nodes."""

    url: str
    files: HeadFiles
    services: SimpleNamespace
    books_url: str
    payouts: dict[str, tuple[str, int]]

    def ask(self, ask: Callable[[Members], Awaitable[T]]) -> T:
        """Ask the books as their owner."""

        async def asked() -> T:
            members = Members(self.books_url)
            try:
                return await ask(members)
            finally:
                await members.close()

        return asyncio.run(asked())

    def ticket(self, uses: int = 1, host: str = HOST) -> EnrolmentTicket:
        secret, record = self.ask(lambda members: members.new_ticket("lab", uses, host, 3600))
        network = self.services.config.network_id
        return EnrolmentTicket(url=self.url, network=network, secret=secret, host=record.host)

    def revoke(self) -> None:
        """Revoke the latest ticket."""
        *_, record = self.ask(lambda members: members.tickets())
        self.ask(lambda members: members.revoke_ticket(record.ticket_id))

    def post(self, path: str, **body: object) -> httpx.Response:
        """Send a request as it is."""
        trust = trusting(self.files.ingress.authority)
        return httpx.post(f"{self.url}/v1/nodes/{path}", json=body, verify=trust)


def member(ticket: EnrolmentTicket, folder: Path, name: str = "ada") -> EnrolledMembership:
    return EnrolledMembership(ticket, folder / name, name=name, host=HOST)


def certificate(folder: Path, name: str = "ada") -> x509.Certificate:
    return read_certificate(TlsFiles.of(folder / name).certificate.read_bytes())


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    with serving(tmp_path / "head") as opened:
        yield opened


class serving:  # noqa: N801 - a context, used as one
    """Serve the routes and the books until the context is left."""

    def __init__(self, home: Path) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        files = head_files(home, ["127.0.0.1"])
        (home / "ray-token").write_text(TOKEN)
        self._access = Access.new(free_port(), ALLOWED)
        enrolment = Enrolment(members_folder(home), Admission(LIFE_S, ("127.0.0.1",)))
        self._payouts: dict[str, tuple[str, int]] = {}
        enrolment.pays = self._pay
        self._books = WireServer(
            EnrolmentCalls, enrolment, self._access.secrets,
            {caller: verbs - ALLOWED[caller] for caller, verbs in allowed_to(enrolment).items()},
        )  # fmt: skip
        api = FastAPI()
        api.include_router(nodes.router)
        api.include_router(accounts.router)
        api.add_exception_handler(AzuError, _refused)
        api.add_exception_handler(RequestValidationError, _invalid)
        authority = files.ingress.authority.read_text()
        api.state.services = SimpleNamespace(
            config=SimpleNamespace(
                dashboard_url=None,
                successions=(),
                enrolment=EnrolmentConfig(url, HEAD, home / "ray-token", files.ray.authority),
                platform_address=PLATFORM,
                chain_url="http://127.0.0.1:1",
                authority=authority,
                network_id=network_id(PLATFORM, authority),
                nodes=NodeLinks.ENCRYPTED,
                policy=load_network().policy,
            ),
            members=Members(self._access.url("ingress")),
            scheduler=self._scheduler,
        )
        shown = {"ssl_certfile": files.ingress.certificate, "ssl_keyfile": files.ingress.key}
        self._server = uvicorn.Server(uvicorn.Config(api, log_level="error", **shown))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._door = Door(url, files, api.state.services, self._access.url("owner"), self._payouts)
        self.asked: list[tuple[object, ...]] = []
        api.state.services.asked = self.asked

    async def _pay(
        self, node_id: str, payout: str, *, key_digest: str, name: str, work_bytes_per_s: int
    ) -> None:
        self._payouts[node_id] = payout, work_bytes_per_s

    async def _scheduler(self, *call: object) -> tuple[bool, bool]:
        self.asked.append(call)
        return True, False

    async def _serve(self) -> None:
        await self._books.start(self._access.port)
        await self._server.serve([self._listener])
        await self._books.close()

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
    assert access.tls.authority.read_bytes() == door.files.ray.authority.read_bytes()
    assert [path.name for path in (tmp_path / "ada").glob("*.key")] == ["node.key"]
    assert access.life is not None
    assert abs(access.life.window.total_seconds() - 0.6 * LIFE_S) < 5


def test_a_ticket_for_one_machine_lets_in_that_machine_alone_and_again(door: Door, tmp_path: Path) -> None:
    ticket = door.ticket()
    first = member(ticket, tmp_path)
    first.access()

    with pytest.raises(Unauthenticated, match="used up"):
        member(ticket, tmp_path, "ben").access()
    first.access()
    (record,) = door.ask(lambda members: members.tickets())
    assert [node.name for node in record.nodes.values()] == ["ada"]


def test_a_ticket_for_another_address_lets_in_no_machine(door: Door, tmp_path: Path) -> None:
    with pytest.raises(Forbidden, match=r"192\.0\.2\.9/32"):
        member(door.ticket(host="192.0.2.9"), tmp_path).access()


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


def test_a_machine_that_the_network_understands_no_more_enrols_and_renews_nothing(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, ticket = member(door.ticket(), tmp_path), door.ticket()
    known.access()
    before = certificate(tmp_path).serial_number

    with monkeypatch.context() as old:
        old.setattr("azu.client.enrolment.own_versions", lambda: Versions(0, 0, "0.0"))
        for machine in (known, member(ticket, tmp_path, "ben")):
            with pytest.raises(OtherVersion, match=r"azu 0\.0 on this node is too old"):
                machine.access()

    assert certificate(tmp_path).serial_number == before
    with monkeypatch.context() as new:
        own = own_versions()
        later = Versions(own.newest + 1, own.newest, "9.0")
        new.setattr("azu.client.enrolment.own_versions", lambda: later)
        member(ticket, tmp_path, "ben").access()  # the ticket was not used up


def test_a_revoked_ticket_lets_in_and_renews_no_machine(door: Door, tmp_path: Path) -> None:
    ticket = door.ticket(uses=2)
    member(ticket, tmp_path).access()

    door.revoke()

    with pytest.raises(Unauthenticated, match="revoked"):
        member(ticket, tmp_path).access()
    with pytest.raises(Unauthenticated, match="revoked"):
        member(ticket, tmp_path, "ben").access()


def test_a_machine_has_its_nodes_paid_as_its_own_key_signs_just_now(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = door.ticket(uses=2)
    ada, ben = member(ticket, tmp_path), member(ticket, tmp_path, "ben")
    for one in (ada, ben):
        one.access()

    node, other = ada.new_node_id(), ben.new_node_id()
    ada.enrol("ada", ALICE, node, SPEED)
    ada.enrol("ada", BOB, node, SPEED)

    assert door.payouts == {node: (BOB, SPEED)}
    key = TlsFiles.of(tmp_path / "ben").key
    right = key.read_bytes()
    key.write_bytes(TlsFiles.of(tmp_path / "ada").key.read_bytes())
    with pytest.raises(Unauthenticated, match="not signed"):
        ben.enrol("ben", ALICE, other, SPEED)
    key.write_bytes(right)
    with monkeypatch.context() as late:
        late.setattr("azu.clock.wall_clock_ms", lambda: wall_clock_ms() - 600_000)
        with pytest.raises(Unauthenticated, match="too old"):
            ben.enrol("ben", ALICE, other, SPEED)
    door.revoke()
    with pytest.raises(Unauthenticated, match="revoked"):
        ben.enrol("ben", ALICE, other, SPEED)
    assert door.payouts == {node: (BOB, SPEED)}


def test_no_machine_is_paid_for_a_node_with_an_id_of_another(door: Door, tmp_path: Path) -> None:
    # The ingress sees the id of a node before the books do, and any member can run code there.
    ticket = door.ticket(uses=2)
    ada, eve = member(ticket, tmp_path), member(ticket, tmp_path, "eve")
    for one in (ada, eve):
        one.access()
    node = ada.new_node_id()

    for taken in (node, node[:40] + "0" * 16, "ab" * 28):
        with pytest.raises(Forbidden, match="of another machine"):
            eve.enrol("eve", BOB, taken, SPEED)

    ada.enrol("ada", ALICE, node, SPEED)
    assert door.payouts == {node: (ALICE, SPEED)}
    assert node != ada.new_node_id()


def test_another_network_at_the_same_address_learns_no_secret(door: Door, tmp_path: Path) -> None:
    ticket = door.ticket()
    with serving(tmp_path / "impostor") as impostor:
        lured = ticket.model_copy(update={"url": impostor.url})

        with pytest.raises(Unauthenticated, match="do not use it"):
            member(lured, tmp_path).access()
        # It shows the true authority's certificate, but the authority did not sign its own.
        config = impostor.services.config
        config.authority = door.files.ingress.authority.read_text()
        with pytest.raises(Unavailable, match="certificate"):
            member(lured, tmp_path).access()
        # It shows another platform beside the true authority.
        config.platform_address = "0x" + "66" * 20
        with pytest.raises(Unauthenticated, match="do not use it"):
            member(lured, tmp_path).access()

    member(ticket, tmp_path).access()  # the ticket is still valid


def test_a_machine_of_another_network_is_not_renewed(door: Door, tmp_path: Path) -> None:
    with serving(tmp_path / "other") as other:
        member(other.ticket(), tmp_path).access()
        stolen = TlsFiles.of(tmp_path / "ada")
    stolen.authority.write_bytes(door.files.ray.authority.read_bytes())

    with pytest.raises(Unauthenticated):
        member(door.ticket().model_copy(update={"secret": "0" * 64}), tmp_path).access()


def test_a_network_that_was_started_again_is_another_run(door: Door, tmp_path: Path) -> None:
    access = member(door.ticket(), tmp_path).access()

    assert access.is_of_same_run(replace(access, life=None))
    assert not access.is_of_same_run(replace(access, head="192.0.2.9:6379"))
    assert not access.is_of_same_run(replace(access, token="cd" * 32))


def test_the_ingress_makes_lists_and_revokes_no_ticket(door: Door) -> None:
    """What runs code in the ingress has its credential, and can mint nothing with it."""
    members = door.services.members

    async def refused() -> None:
        pretender = Members(str(members._place.geturl()))
        for call in (
            pretender.new_ticket("", 1, "0.0.0.0/0", 60),
            pretender.tickets(),
            pretender.revoke_ticket("ticket-0"),
        ):
            with pytest.raises(Forbidden, match="no call of the ingress"):
                await call
        await pretender.close()

    asyncio.run(refused())
    assert door.post("tickets", host="0.0.0.0/0").status_code == 404


def test_a_machine_asks_for_the_turn_of_its_node(door: Door, tmp_path: Path) -> None:
    machine = member(door.ticket(), tmp_path)
    machine.access()

    found = machine.ask_restart("ada-0")

    assert (found.turn, found.left) == (True, False)
    assert door.services.asked == [("restart", "ada-0", frozenset({HOST, "127.0.0.1"}))]


def test_only_a_machine_of_the_network_asks_for_a_turn(door: Door, tmp_path: Path) -> None:
    with serving(tmp_path / "other") as other:
        machine = member(other.ticket(), tmp_path)
        machine.access()
        stranger = TlsFiles.of(tmp_path / "ada")
    at_ms = wall_clock_ms()
    for key, name in ((stranger.key.read_bytes(), "ada"), (new_key(), "ada")):
        reply = door.post(
            "restart",
            certificate=stranger.certificate.read_text(),
            signed_at_ms=at_ms,
            signature=sign_text(key, restart_text(name, at_ms)),
            name=name,
        )
        assert reply.status_code == 401
    assert door.services.asked == []


@pytest.mark.parametrize("nodes_are", [NodeLinks.LOCAL, NodeLinks.FOREIGN])
def test_a_network_without_tickets_says_why(door: Door, nodes_are: NodeLinks) -> None:
    door.services.config.enrolment, door.services.config.nodes = None, nodes_are

    reply = door.post("enrol", **ENROL)

    assert reply.status_code == 404
    told = "only its own machine" if nodes_are is NodeLinks.LOCAL else "did not start this Ray cluster"
    assert told in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("enrol", ENROL | {"secret": "x"}, "secret"),
        (
            "enrol",
            {"secret": "0" * 64, "name": "", "host": HOST, "request": "", "versions": VERSIONS},
            "name",
        ),
        (
            "enrol",
            {"secret": "0" * 64, "name": "ada\x1b[2J", "host": HOST, "request": "", "versions": VERSIONS},
            "name",
        ),
        (
            "enrol",
            {"secret": "0" * 64, "name": "a", "host": "ada.example", "request": "", "versions": VERSIONS},
            "host",
        ),
        (
            "enrol",
            {"secret": "0" * 64, "name": "a", "host": HOST, "request": "hello", "versions": VERSIONS},
            "request",
        ),
        (
            "enrol",
            {"secret": "0" * 64, "name": "a", "host": HOST, "request": "x" * 9000, "versions": VERSIONS},
            "request",
        ),
        (
            "renew",
            {"certificate": "hello", "signed_at_ms": 1, "signature": "00", "versions": VERSIONS},
            "certificate",
        ),
        ("renew", {"certificate": "hello", "signed_at_ms": 1, "signature": "00"}, "versions"),
        (
            "restart",
            {"certificate": "hello", "signed_at_ms": 1, "signature": "00", "name": "a"},
            "certificate",
        ),
    ],
)
def test_bad_input_is_refused_by_name(door: Door, path: str, body: dict[str, object], param: str) -> None:
    reply = door.post(path, **body)

    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
