"""The tickets with which machines join an encrypted network, and the calls of what checks them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from pydantic import ConfigDict, TypeAdapter


@dataclass(frozen=True, slots=True)
class AdmittedNode:
    """A node that came with a ticket: the address in its certificates, and when the last one was signed."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    host: str
    signed_at_ms: int


@dataclass(frozen=True, slots=True)
class TicketRecord:
    """A ticket without its secret, which is not stored. `nodes` has the admitted nodes by their keys' hashes.

    It is for the machines whose addresses are in the range `host` (CIDR), up to `uses` of them.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    ticket_id: str
    digest: str
    label: str
    uses: int
    host: str
    created_at_ms: int
    expires_at_ms: int
    revoked_at_ms: int | None = None
    nodes: Mapping[str, AdmittedNode] = field(default_factory=dict)

    def is_open(self, now_ms: int) -> bool:
        """Whether machines can still join with the ticket."""
        return self.revoked_at_ms is None and now_ms < self.expires_at_ms

    def counts_until_ms(self, life: timedelta) -> int:
        """Return when the ticket and the last certificate that was signed by it have ended."""
        life_ms = round(life.total_seconds() * 1000)
        return max([self.expires_at_ms, *(node.signed_at_ms + life_ms for node in self.nodes.values())])


@dataclass(frozen=True, slots=True)
class NodeCertificate:
    """A node's certificate, and the authority to which the certificates of all nodes belong (PEM)."""

    certificate: str
    authority: str


@dataclass(frozen=True, slots=True)
class Admission:
    """How a network admits nodes: how long their certificates are valid.

    No certificate is given for the addresses `head_hosts`. With a reason in `makes_none` no ticket is made.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    life_s: float
    head_hosts: tuple[str, ...]
    makes_none: str = ""

    def to_json(self) -> str:
        """Return the admission for the command line of the books."""
        return _ADMISSION.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "Admission":
        """Return the admission that `to_json` wrote."""
        return _ADMISSION.validate_json(text)


_ADMISSION = TypeAdapter(Admission)


class EnrolmentCalls:
    """The calls by which machines become and stay nodes.

    Each raises Unavailable when the books do not answer, or their disk fails. It is safe to make a call
    again; that makes one ticket more.
    """

    async def new_ticket(
        self, label: str, uses: int, host: str, expires_in_s: int
    ) -> tuple[str, TicketRecord]:
        """Return the secret of a new ticket in hex, and the ticket; `host` is an address or a range (CIDR).

        Raises Forbidden where this network makes no tickets.
        """

    async def tickets(self) -> tuple[TicketRecord, ...]:
        """Return the tickets that still count, in the order in which they were made."""

    async def revoke_ticket(self, ticket_id: str) -> None:
        """Admit no more nodes with a ticket, and renew none of its nodes; raises NotFound."""

    async def enrol(self, secret: str, name: str, host: str, request: str) -> NodeCertificate:
        """Admit the node whose key signed a certificate request (PEM), for its own address alone.

        A node that asks again, because an answer was lost, is not counted twice. Raises Unauthenticated when
        the ticket is unknown, revoked, expired or used up, Forbidden for an address that it is not for.
        """

    async def renew(self, certificate: str, signed_at_ms: int, signature: str) -> NodeCertificate:
        """Return a later certificate for the key and the address of a node that shows its present one.

        Raises Unauthenticated unless the certificate is of this network and valid, its key signed
        `renewal_text` just now, and the node's ticket was not revoked.
        """

    async def set_payout(
        self,
        certificate: str,
        node_id: str,
        payout: str,
        name: str,
        work_bytes_per_s: int,
        signed_at_ms: int,
        signature: str,
    ) -> None:
        """Have the books pay an address for the work of a Ray node, as the machine's key signed.

        The text is `payout_text`. Raises what `renew` does, and Forbidden for an id that does not begin like
        the hash of the machine's key.
        """
