"""What opens a network to this machine: all in the ticket, or given for it and renewed from then on."""

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


class _Word(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    def encode(self) -> str:
        """Return the ticket as one word."""
        return base64.urlsafe_b64encode(self.model_dump_json().encode()).decode().rstrip("=")


class Ticket(_Word):
    """Where an unencrypted network's Ray head is ("host:port") and the token that opens it."""

    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+:\d{1,5}$")]
    token: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    version: Literal[1] = 1


class EnrolmentTicket(_Word):
    """Where an encrypted network lets nodes in, whose certificate that has to be, and a secret to show there.

    `authority_sha256` is the fingerprint of the network's certificate authority. The certificate of the
    ingress itself is that authority's or, if it is `publicly_trusted`, one that this machine's system trusts.
    """

    url: Annotated[str, Field(pattern=r"^https://[A-Za-z0-9.:\[\]-]+$", max_length=300)]
    authority_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    secret: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    publicly_trusted: bool = False
    version: Literal[2] = 2


AnyTicket = Ticket | EnrolmentTicket
_ANY: TypeAdapter[AnyTicket] = TypeAdapter(Annotated[AnyTicket, Field(discriminator="version")])


def decode_ticket(text: str) -> AnyTicket:
    """Return the ticket of a word that `encode` made; raises ConfigurationError for any other."""
    word = text.strip()
    try:
        content = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
        return _ANY.validate_json(content)
    except (binascii.Error, ValueError, ValidationError) as error:
        raise ConfigurationError(
            "the ticket is damaged or of another version of azu; copy it whole", param="ticket"
        ) from error


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where one machine's certificate and key lie, and the certificate of who signed all of them."""

    certificate: Path
    key: Path
    authority: Path

    @classmethod
    def of(cls, folder: Path) -> "TlsFiles":
        """Return the files of a folder, whether they are there or not."""
        return cls(folder / "node.crt", folder / "node.key", folder / "authority.crt")

    def ray_environment(self) -> dict[str, str]:
        """Return what makes Ray encrypt all it says to other processes, and ask them for a certificate."""
        return {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": str(self.certificate.absolute()),
            "RAY_TLS_SERVER_KEY": str(self.key.absolute()),
            "RAY_TLS_CA_CERT": str(self.authority.absolute()),
        }

    def write(self, certificate_pem: bytes, authority_pem: bytes) -> None:
        """Put a new certificate in place of the old one."""
        write_private(self.authority, authority_pem.decode())
        # The whole chain: whoever asks for the authority is given it.
        write_private(self.certificate, (certificate_pem + authority_pem).decode())


def head_files(folder: Path, hosts: Iterable[str]) -> TlsFiles:
    """Return a new certificate of the head, by the network's authority, which is made when there is none.

    Raises ConfigurationError when the authority's files are damaged.
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
    """Return where the head keeps the authority's key; no other machine has one."""
    return folder / "authority.key"


def _authority(folder: Path) -> "Authority":
    from azu.auth.certificates import Authority, utc_now

    certificate, key = TlsFiles.of(folder).authority, authority_key(folder)
    if not key.exists():
        made = Authority.new(utc_now())
        # The key comes last: without it nothing was made yet.
        write_private(certificate, made.pem.decode())
        write_private(key, made.key_pem.decode())
    try:
        return Authority.load(certificate.read_bytes(), key.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the authority in {folder} is damaged; without the folder `azu up` makes another, and every "
            "node needs a new ticket"
        ) from error


@dataclass(frozen=True, slots=True)
class ClusterAccess:
    """Where Ray's head is ("host:port"), the token that opens it and, if it is encrypted, the certificate.

    From `renewed_from` on the nodes that run with it are to be started again with a later one.
    """

    head: str
    token: str = field(repr=False)
    tls: TlsFiles | None = None
    renewed_from: datetime | None = None

    def outlived_by(self, later: "ClusterAccess", now: datetime) -> bool:
        """Say whether nodes that run with this one have to be started again with a later one."""
        moved = (self.head, self.token) != (later.head, later.token)
        return moved or (self.renewed_from is not None and now >= self.renewed_from)


class Membership(Protocol):
    """A machine's right to be part of a network."""

    def access(self) -> ClusterAccess:
        """Return what opens the network now; raises Unauthenticated when nothing does any more."""


@dataclass(frozen=True, slots=True)
class PlainMembership:
    """What a ticket of an unencrypted network gives: always the same."""

    opened: ClusterAccess

    def access(self) -> ClusterAccess:
        """Return what the ticket holds."""
        return self.opened


class EnrolledMembership:
    """A machine with a certificate of the network: for its ticket at first, then for the one it has."""

    def __init__(
        self,
        ticket: EnrolmentTicket,
        folder: Path,
        *,
        name: str,
        host: str,
    ) -> None:
        """Keep key and certificate in `folder`; `host` is the address at which other nodes reach this one."""
        self._ticket = ticket
        self._folder = folder
        self._files = TlsFiles.of(folder)
        self._name = name
        self._host = host

    def access(self) -> ClusterAccess:
        """Renew the certificate, or get one for the ticket; asks the network each time."""
        from azu.auth.certificates import RENEWED_BEFORE_END, read_certificate
        from azu.client.http import trusting_only

        authority = self._authority()
        trust = ssl.create_default_context() if self._ticket.publicly_trusted else trusting_only(authority)
        admitted = self._renewed(trust) or self._enrolled(trust)
        certificate = admitted.certificate.encode()
        self._files.write(certificate, authority.encode())
        ends = read_certificate(certificate).not_valid_after_utc
        return ClusterAccess(admitted.head, admitted.token, self._files, ends - RENEWED_BEFORE_END)

    def _authority(self) -> str:
        from azu.client.enrolment import fetch_authority
        from azu.client.http import fingerprint

        if self._files.authority.exists():
            known = self._files.authority.read_text()
            if fingerprint(known) == self._ticket.authority_sha256:
                return known
        return fetch_authority(self._ticket.url, self._ticket.authority_sha256)

    def _renewed(self, trust: ssl.SSLContext) -> "NodeAdmission | None":
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
            # It ended, or came with a ticket that was revoked: the one at hand may be another.
            return None

    def _enrolled(self, trust: ssl.SSLContext) -> "NodeAdmission":
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
    """Return what a ticket gives; an enrolled machine's key and certificate are kept under `home`."""
    if isinstance(ticket, EnrolmentTicket):
        folder = home / "networks" / ticket.authority_sha256[:16]
        return EnrolledMembership(ticket, folder, name=name, host=host)
    return PlainMembership(ClusterAccess(ticket.address, ticket.token))
