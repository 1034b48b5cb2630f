"""How a machine becomes and stays a member of a network: tickets, certificates and their renewal."""

import base64
import binascii
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from azu.errors import ConfigurationError, Unauthenticated
from azu.files import write_private

if TYPE_CHECKING:
    from azu.api.network import NodeAdmission
    from azu.auth.certificates import Authority


NetworkId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _TicketModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    def encode(self) -> str:
        """Return the ticket as one word of text."""
        return base64.urlsafe_b64encode(self.model_dump_json().encode()).decode().rstrip("=")


class Ticket(_TicketModel):
    """An unencrypted network: the address of its Ray head ("host:port") and the cluster's token.

    `network` is the network's id.
    """

    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+:\d{1,5}$")]
    network: NetworkId
    token: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    version: Literal[1] = 1


class EnrolmentTicket(_TicketModel):
    """An encrypted network: the URL at which it admits nodes, and the secret that a node sends there.

    `network` is the network's id, which a node checks before it sends the secret.
    """

    url: Annotated[str, Field(pattern=r"^https://[A-Za-z0-9.:\[\]-]+$", max_length=300)]
    network: NetworkId
    secret: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    version: Literal[2] = 2


AnyTicket = Ticket | EnrolmentTicket
_ANY_TICKET: TypeAdapter[AnyTicket] = TypeAdapter(Annotated[AnyTicket, Field(discriminator="version")])


def decode_ticket(text: str) -> AnyTicket:
    """Return the ticket that `encode` made a word of; raises ConfigurationError for any other word."""
    word = text.strip()
    try:
        content = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
        return _ANY_TICKET.validate_json(content)
    except (binascii.Error, ValueError, ValidationError) as error:
        raise ConfigurationError(
            "the ticket is damaged or of another version of azu; copy it whole", param="ticket"
        ) from error


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The files of one machine's certificate and key, and of the certificate of the network's authority."""

    certificate: Path
    key: Path
    authority: Path

    @classmethod
    def of(cls, folder: Path) -> "TlsFiles":
        """Return the paths of these files in a folder, whether they exist or not."""
        return cls(folder / "node.crt", folder / "node.key", folder / "authority.crt")

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
class ClusterAccess:
    """What a Ray node needs to join: the head's address ("host:port"), the token, with TLS the certificate.

    At `renewed_from` the nodes that run with it have to be started again with a later one.
    """

    head: str
    token: str = field(repr=False)
    tls: TlsFiles | None = None
    renewed_from: datetime | None = None

    def is_outdated(self, later: "ClusterAccess", now: datetime) -> bool:
        """Return whether nodes that run with this access have to be started again with a later one."""
        changed = (self.head, self.token) != (later.head, later.token)
        return changed or (self.renewed_from is not None and now >= self.renewed_from)


class Membership(Protocol):
    """A machine's right to be part of a network."""

    def access(self) -> ClusterAccess:
        """Return what joins the network now; raises Unauthenticated when the machine may no longer join."""


@dataclass(frozen=True, slots=True)
class PlainMembership:
    """Membership of an unencrypted network: the access never changes."""

    granted: ClusterAccess

    def access(self) -> ClusterAccess:
        """Return the access that the ticket holds."""
        return self.granted


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
        from azu.auth.certificates import RENEWED_BEFORE_END, read_certificate
        from azu.client.known_network import known_network

        network = known_network(self._ticket.url, self._ticket.network)
        trust = network.trust() or ssl.create_default_context()
        admitted = self._renew(trust) or self._enrol(trust)
        certificate = admitted.certificate.encode()
        self._files.write(certificate, admitted.authority.encode())
        ends = read_certificate(certificate).not_valid_after_utc
        return ClusterAccess(admitted.head, admitted.token, self._files, ends - RENEWED_BEFORE_END)

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


def membership_of(ticket: AnyTicket, home: Path, *, name: str, host: str) -> Membership:
    """Return the membership that a ticket gives; key and certificate of the machine are kept under `home`."""
    if isinstance(ticket, EnrolmentTicket):
        folder = home / "networks" / ticket.network
        return EnrolledMembership(ticket, folder, name=name, host=host)
    return PlainMembership(ClusterAccess(ticket.address, ticket.token))


def head_files(folder: Path, hosts: Iterable[str]) -> TlsFiles:
    """Return a new certificate of the head, signed by the network's authority.

    The authority is made when there is none. Raises ConfigurationError when its files are damaged.
    """
    from azu.auth.certificates import HEAD_LIFE, certificate_pem, new_key, new_request, read_request, utc_now

    authority = _authority(folder)
    files = TlsFiles.of(folder)
    key = new_key()
    write_private(files.key, key.decode())
    signed = authority.sign(read_request(new_request(key)), hosts, utc_now(), HEAD_LIFE)
    files.write(certificate_pem(signed), authority.pem)
    return files


def authority_key(folder: Path) -> Path:
    """Return the file of the authority's key, which only the head's machine has."""
    return folder / "authority.key"


def _authority(folder: Path) -> "Authority":
    from azu.auth.certificates import Authority, utc_now

    certificate, key = TlsFiles.of(folder).authority, authority_key(folder)
    if not key.exists():
        new = Authority.new(utc_now())
        # The key comes last: an authority without it is made anew.
        write_private(certificate, new.pem.decode())
        write_private(key, new.key_pem.decode())
    try:
        return Authority.load(certificate.read_bytes(), key.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the authority in {folder} is damaged; without the folder `azu up` makes another, and every "
            "node needs a new ticket"
        ) from error
