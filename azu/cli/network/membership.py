"""What opens a network to this machine: all in the ticket, or given for it and renewed from then on."""

import ssl
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from azu.cli.network.tickets import AnyTicket, EnrolmentTicket
from azu.cli.network.tls import TlsFiles
from azu.cli.private_file import write_private
from azu.errors import Unauthenticated

if TYPE_CHECKING:
    from azu.client.enrolment import Admission


@dataclass(frozen=True, slots=True)
class Access:
    """Where Ray's head is ("host:port"), the token that opens it and, if it is encrypted, the certificate.

    From `renewed_from` on the nodes that run with it are to be started again with a later one.
    """

    head: str
    token: str = field(repr=False)
    tls: TlsFiles | None = None
    renewed_from: datetime | None = None

    def outlived_by(self, later: "Access", now: datetime) -> bool:
        """Say whether nodes that run with this one have to be started again with a later one."""
        moved = (self.head, self.token) != (later.head, later.token)
        return moved or (self.renewed_from is not None and now >= self.renewed_from)


class Membership(Protocol):
    """A machine's right to be part of a network."""

    def access(self) -> Access:
        """Return what opens the network now; raises Unauthenticated when nothing does any more."""


@dataclass(frozen=True, slots=True)
class PlainMembership:
    """What a ticket of an unencrypted network gives: always the same."""

    opened: Access

    def access(self) -> Access:
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

    def access(self) -> Access:
        """Renew the certificate, or get one for the ticket; asks the network each time."""
        from azu.auth.certificates import RENEWED_BEFORE_END, read_certificate
        from azu.client.tls import trusting_only

        authority = self._authority()
        trust = ssl.create_default_context() if self._ticket.publicly_trusted else trusting_only(authority)
        admitted = self._renewed(trust) or self._enrolled(trust)
        certificate = admitted.certificate.encode()
        self._files.write(certificate, authority.encode())
        ends = read_certificate(certificate).not_valid_after_utc
        return Access(admitted.head, admitted.token, self._files, ends - RENEWED_BEFORE_END)

    def _authority(self) -> str:
        from azu.client.enrolment import fetch_authority
        from azu.client.tls import fingerprint

        if self._files.authority.exists():
            known = self._files.authority.read_text()
            if fingerprint(known) == self._ticket.authority_sha256:
                return known
        return fetch_authority(self._ticket.url, self._ticket.authority_sha256)

    def _renewed(self, trust: ssl.SSLContext) -> "Admission | None":
        from azu.auth.certificates import sign_text
        from azu.client.enrolment import renew, renewal_text

        if not (self._files.certificate.exists() and self._files.key.exists()):
            return None
        at_ms = time.time_ns() // 1_000_000
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

    def _enrolled(self, trust: ssl.SSLContext) -> "Admission":
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
    return PlainMembership(Access(ticket.address, ticket.token))
