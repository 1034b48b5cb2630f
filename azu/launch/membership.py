"""How a machine becomes and stays a member of a network: tickets, certificates and their renewal."""

import base64
import binascii
import socket
import ssl
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from azu.errors import ConfigurationError, NotFound, Unauthenticated, Unavailable
from azu.files import write_private
from azu.protocol.versions import Versions, own_versions

if TYPE_CHECKING:
    from azu.api.network import NodeAdmission, RestartResponse

# The part of a certificate's life after which it is renewed.
_RENEWED_AFTER = 0.4
_REACH_TIMEOUT_S = 2.0
DEAD_TICKET = (
    "this ticket is dead, since the network has another token or port now: join with the one that `azu up` "
    "printed last"
)
# Ray's processes on it are reached by those of the same machine alone.
LOOPBACK = "127.0.0.1"


NetworkId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _TicketModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    # Of the program that made the ticket.
    versions: Versions = Field(default_factory=own_versions)

    def encode(self) -> str:
        """Return the ticket as one word of text."""
        return base64.urlsafe_b64encode(self.model_dump_json().encode()).decode().rstrip("=")


class Ticket(_TicketModel):
    """An unencrypted network, for this machine alone: the port of its Ray head and the cluster's token.

    `network` is the network's id.
    """

    port: Annotated[int, Field(ge=1, le=65535)]
    network: NetworkId
    token: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    version: Literal[1] = 1


class EnrolmentTicket(_TicketModel):
    """An encrypted network: the URL at which it admits nodes, and the secret that a node sends there.

    `network` is the network's id, which a node checks before it sends the secret. The ticket is for machines
    in the range `host` (CIDR).
    """

    url: Annotated[str, Field(pattern=r"^https://[A-Za-z0-9.:\[\]-]+$", max_length=300)]
    network: NetworkId
    secret: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    host: Annotated[str, Field(pattern=r"^[0-9a-f.:]+/\d{1,3}$")]
    version: Literal[2] = 2


class _AnyVersion(BaseModel):
    """What every ticket has, whatever else a later release puts into it."""

    versions: Versions | None = None


AnyTicket = Ticket | EnrolmentTicket
_ANY_TICKET: TypeAdapter[AnyTicket] = TypeAdapter(Annotated[AnyTicket, Field(discriminator="version")])


def decode_ticket(text: str) -> AnyTicket:
    """Return the ticket that `encode` made a word of; raises ConfigurationError for any other word.

    Raises OtherVersion, which says what to install, where its network does not take this machine. A network
    that admits nodes by itself may be of a later release than its ticket: it is asked when they enrol.
    """
    word, own = text.strip(), own_versions()
    try:
        content = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
        # First, because a later release may have changed the ticket.
        known = _AnyVersion.model_validate_json(content).versions
        if known is not None and own.newest < known.oldest:
            known.check_node(own)
        ticket = _ANY_TICKET.validate_json(content)
    except (binascii.Error, ValueError, ValidationError) as error:
        raise ConfigurationError(
            "the ticket is damaged or of another version of azu; copy it whole", param="ticket"
        ) from error
    if isinstance(ticket, Ticket):
        ticket.versions.check_node(own)
    return ticket


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The files of one machine's certificate and key, and of the certificate of the network's authority."""

    certificate: Path
    key: Path
    authority: Path

    @classmethod
    def of(cls, folder: Path, name: str = "node") -> "TlsFiles":
        """Return the paths of these files in a folder, whether they exist or not."""
        return cls(folder / f"{name}.crt", folder / f"{name}.key", folder / "authority.crt")

    def ray_environment(self) -> dict[str, str]:
        """Return the variables that have Ray encrypt its connections and check both ends' certificates."""
        return {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": str(self.certificate.absolute()),
            "RAY_TLS_SERVER_KEY": str(self.key.absolute()),
            "RAY_TLS_CA_CERT": str(self.authority.absolute()),
        }

    def write(self, certificate_pem: bytes, authority_pem: bytes) -> None:
        """Replace the certificate and the authority's certificate."""
        write_private(self.authority, authority_pem.decode())
        # The whole chain: the ingress sends its last certificate to nodes that ask for the authority.
        write_private(self.certificate, (certificate_pem + authority_pem).decode())


@dataclass(frozen=True, slots=True)
class CertificateLife:
    """A node that was started with a certificate works until `ends`.

    From `renewed_from` on it is to be started again with a later one.
    """

    renewed_from: datetime
    ends: datetime

    @property
    def window(self) -> timedelta:
        """The time in which that has to happen."""
        return self.ends - self.renewed_from


@dataclass(frozen=True, slots=True)
class ClusterAccess:
    """What a Ray node needs to join: the head's address ("host:port"), the token, with TLS a certificate."""

    head: str
    token: str = field(repr=False)
    tls: TlsFiles | None = None
    life: CertificateLife | None = None

    def is_of_same_run(self, later: "ClusterAccess") -> bool:
        """Return whether a later access opens the same cluster; else its token or its address is another."""
        return (self.head, self.token) == (later.head, later.token)


class Membership(Protocol):
    """A machine's right to be part of a network."""

    def access(self) -> ClusterAccess:
        """Return what joins the network now; raises Unauthenticated when the machine may no longer join."""

    def ask_restart(self, name: str) -> "RestartResponse":
        """Ask for the turn of one of the machine's nodes, which then gives away what it holds."""

    def new_node_id(self) -> str:
        """Return a new id for a node of the machine."""

    def enrol(self, name: str, payout: str, node_id: str, work_bytes_per_s: int) -> None:
        """Have the books pay an address for the work of the node with this id, at most at this speed.

        Raises Unavailable, and Unauthenticated when the machine may no longer join.
        """


@dataclass(frozen=True, slots=True)
class PlainMembership:
    """Membership of an unencrypted network: the access is the same at each of its starts."""

    granted: ClusterAccess
    money_home: Path

    def access(self) -> ClusterAccess:
        """Return the access that the ticket holds; raises Unavailable while its network does not run."""
        if not head_answers(self.granted.head):
            raise Unavailable(f"no network answers at {self.granted.head}; this goes on once one does")
        return self.granted

    def ask_restart(self, name: str) -> "RestartResponse":
        """No certificate ends here, and no node is started again for one."""
        raise NotImplementedError(name)

    def new_node_id(self) -> str:
        """Return a new id."""
        from azu.auth.certificates import new_node_id

        return new_node_id()

    def enrol(self, name: str, payout: str, node_id: str, work_bytes_per_s: int) -> None:
        """Tell the books of this machine, if they are here; what the node earns is held else."""
        from azu.launch.sidecars import enrol_own_node

        with suppress(NotFound):
            enrol_own_node(self.money_home, name, payout, node_id, work_bytes_per_s)


def head_answers(head: str) -> bool:
    """Return whether a process listens at a Ray head's address ("host:port")."""
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_TIMEOUT_S).close()
    except OSError:
        return False
    return True


class EnrolledMembership:
    """Membership of an encrypted network: a certificate, got with the ticket and renewed from then on."""

    def __init__(self, ticket: EnrolmentTicket, folder: Path, *, name: str, host: str) -> None:
        """Keep key and certificate in `folder`; `host` is this machine's address for other nodes."""
        self._ticket = ticket
        self._files = TlsFiles.of(folder)
        self._name = name
        self._host = host

    def access(self) -> ClusterAccess:
        """Return access with a new certificate, which the network signs at each call."""
        from azu.auth.certificates import read_certificate, utc_now
        from azu.client.known_network import known_network

        network = known_network(self._ticket.url, self._ticket.network)
        trust = network.trust() or ssl.create_default_context()
        admitted = self._renew(trust) or self._enrol(trust)
        certificate = admitted.certificate.encode()
        self._files.write(certificate, admitted.authority.encode())
        now, ends = utc_now(), read_certificate(certificate).not_valid_after_utc
        life = CertificateLife(now + _RENEWED_AFTER * (ends - now), ends)
        return ClusterAccess(admitted.head, admitted.token, self._files, life)

    def new_node_id(self) -> str:
        """Return a new id that no other machine can enrol: it begins like the hash of this machine's key."""
        from azu.auth.certificates import key_digest, new_node_id, public_key, read_certificate

        certificate = read_certificate(self._files.certificate.read_bytes())
        return new_node_id(key_digest(public_key(certificate)))

    def enrol(self, name: str, payout: str, node_id: str, work_bytes_per_s: int) -> None:
        """Have the books pay an address, with the signature of this machine's key."""
        from azu.auth.certificates import payout_text, sign_text
        from azu.client.enrolment import set_payout
        from azu.client.known_network import known_network
        from azu.clock import wall_clock_ms

        trust = known_network(self._ticket.url, self._ticket.network).trust() or ssl.create_default_context()
        at_ms = wall_clock_ms()
        text = payout_text(node_id, payout, name, work_bytes_per_s, at_ms)
        body = {
            "certificate": self._files.certificate.read_text(),
            "node_id": node_id,
            "payout": payout,
            "name": name,
            "work_bytes_per_s": work_bytes_per_s,
            "signed_at_ms": at_ms,
            "signature": sign_text(self._files.key.read_bytes(), text),
        }
        set_payout(self._ticket.url, trust, body)

    def _renew(self, trust: ssl.SSLContext) -> "NodeAdmission | None":
        from azu.auth.certificates import renewal_text, sign_text
        from azu.client.enrolment import renew
        from azu.clock import wall_clock_ms

        if not (self._files.certificate.exists() and self._files.key.exists()):
            return None
        at_ms = wall_clock_ms()
        signature = sign_text(self._files.key.read_bytes(), renewal_text(at_ms))
        try:
            return renew(
                self._ticket.url,
                trust,
                certificate_pem=self._files.certificate.read_text(),
                signed_at_ms=at_ms,
                signature=signature,
            )
        except Unauthenticated:
            # The certificate expired, or its ticket was revoked; the ticket at hand may be another one.
            return None

    def ask_restart(self, name: str) -> "RestartResponse":
        """Ask for a node's turn, by the machine's certificate."""
        from azu.auth.certificates import restart_text, sign_text
        from azu.client.enrolment import ask_restart
        from azu.client.known_network import known_network
        from azu.clock import wall_clock_ms

        network, at_ms = known_network(self._ticket.url, self._ticket.network), wall_clock_ms()
        return ask_restart(
            self._ticket.url,
            network.trust() or ssl.create_default_context(),
            certificate_pem=self._files.certificate.read_text(),
            signed_at_ms=at_ms,
            signature=sign_text(self._files.key.read_bytes(), restart_text(name, at_ms)),
            name=name,
        )

    def _enrol(self, trust: ssl.SSLContext) -> "NodeAdmission":
        from azu.auth.certificates import new_key, new_request
        from azu.client.enrolment import enrol

        if not self._files.key.exists():
            write_private(self._files.key, new_key().decode())
        return enrol(
            self._ticket.url,
            trust,
            secret=self._ticket.secret,
            name=self._name,
            host=self._host,
            request_pem=new_request(self._files.key.read_bytes()).decode(),
        )


def membership_of(
    ticket: AnyTicket, home: Path, *, name: str, host: str, money_home: Path | None = None
) -> Membership:
    """Return the membership that a ticket gives; key and certificate of the machine are kept under `home`.

    The books of a network that runs on this machine are found in `money_home`.
    """
    if isinstance(ticket, EnrolmentTicket):
        folder = home / "networks" / ticket.network
        return EnrolledMembership(ticket, folder, name=name, host=host)
    return PlainMembership(ClusterAccess(f"{LOOPBACK}:{ticket.port}", ticket.token), money_home or home)


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """The head's two certificates: one for Ray's nodes, and one that the ingress shows to clients."""

    ray: TlsFiles
    ingress: TlsFiles


def head_files(home: Path, hosts: Iterable[str], members: Path | None = None) -> HeadFiles:
    """Return new certificates of the head; the authorities are made when there are none.

    They are those in the folder `members`, by default the one of `home`. Raises ConfigurationError when their
    files are damaged.
    """
    from azu.auth.enrolment import INGRESS, NODES

    hosts, members = tuple(hosts), members or members_folder(home)
    return HeadFiles(
        _signed(members, NODES, TlsFiles.of(home / "tls"), hosts),
        _signed(members, INGRESS, TlsFiles.of(home / "ingress", "ingress"), hosts),
    )


def members_folder(money_home: Path) -> Path:
    """Return the folder of azu/auth/enrolment.py; it lies with the books."""
    return money_home / "books"


def _signed(folder: Path, name: str, files: TlsFiles, hosts: Iterable[str]) -> TlsFiles:
    from azu.auth.certificates import HEAD_LIFE, certificate_pem, new_key, new_request, read_request, utc_now
    from azu.auth.enrolment import NODES, kept_authority

    authority = kept_authority(folder, name, utc_now())
    key = new_key()
    write_private(files.key, key.decode())
    request = read_request(new_request(key))
    signed = authority.sign(request, hosts, utc_now(), HEAD_LIFE, is_client=name == NODES)
    files.write(certificate_pem(signed), authority.pem)
    return files
