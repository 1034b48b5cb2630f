"""How machines become and stay nodes of an encrypted network: tickets, and the certificates that follow.

The folder holds the authorities and the tickets; one process uses it, and nothing of Ray can read it:

`nodes.crt`, `nodes.key`      the authority that signs the nodes' certificates
`ingress.crt`, `ingress.key`  the authority that signs the ingress's certificate
`tickets.json`                the tickets, and the nodes that came with each
"""

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from pydantic import TypeAdapter, ValidationError

from azu.auth.certificates import (
    FRESH_MS,
    Authority,
    certificate_pem,
    check_signed_text,
    is_id_of,
    key_digest,
    payout_text,
    public_key,
    read_certificate,
    read_request,
    renewal_text,
    utc_now,
)
from azu.auth.tickets import Admission, AdmittedNode, EnrolmentCalls, NodeCertificate, TicketRecord
from azu.errors import ConfigurationError, Forbidden, InvalidRequest, NotFound, Unauthenticated
from azu.files import disk_errors, replacing, write_all, write_private

NODES, INGRESS = "nodes", "ingress"
_TICKETS = "tickets.json"
_SECRET_BYTES = 32
_ID_DIGITS = 16
_MAX_TICKETS = 1000


_RECORDS = TypeAdapter(tuple[TicketRecord, ...])


class Enrolment(EnrolmentCalls):
    """Carries out the calls of azu/auth/tickets.py with what lies in the folder."""

    def __init__(
        self,
        folder: Path,
        admission: Admission,
        *,
        now: Callable[[], datetime] = utc_now,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._authority = kept_authority(folder, NODES, now())
        self._path = folder / _TICKETS
        self._head_hosts = frozenset(map(_parsed, admission.head_hosts))
        self._life = timedelta(seconds=admission.life_s)
        self._makes_none = admission.makes_none
        self._now = now
        self._random_bytes = random_bytes
        self._records = _read(self._path)
        # By node: when and what its machine signed last, while that counts as new.
        self._payouts: dict[str, tuple[int, str]] = {}
        # The books' call `enrol_node`.
        self.pays: Callable[..., Awaitable[None]] | None = None

    async def new_ticket(
        self, label: str, uses: int, host: str, expires_in_s: int
    ) -> tuple[str, TicketRecord]:
        if self._makes_none:
            raise Forbidden(self._makes_none, code="no_tickets")
        secret, now_ms = self._random_bytes(_SECRET_BYTES).hex(), self._now_ms()
        if sum(one.is_open(now_ms) for one in self._records.values()) >= _MAX_TICKETS:
            raise Forbidden(f"there are {_MAX_TICKETS} tickets; revoke some", code="too_many_tickets")
        record = TicketRecord(
            ticket_id=_id_of(secret),
            digest=_digest(secret),
            label=label,
            uses=uses,
            host=range_of(host),
            created_at_ms=now_ms,
            expires_at_ms=now_ms + 1000 * expires_in_s,
        )
        self._keep(record)
        return secret, record

    async def tickets(self) -> tuple[TicketRecord, ...]:
        return tuple(sorted(self._records.values(), key=lambda one: (one.created_at_ms, one.ticket_id)))

    async def revoke_ticket(self, ticket_id: str) -> None:
        record = self._records.get(ticket_id)
        if record is None:
            raise NotFound(f"there is no ticket {ticket_id}", param="ticket_id", code="ticket_not_found")
        if record.revoked_at_ms is None:
            self._keep(replace(record, revoked_at_ms=self._now_ms()))

    async def enrol(self, secret: str, name: str, host: str, request: str) -> NodeCertificate:
        key = read_request(request.encode())
        digest, address = key_digest(key), _parsed(host)
        record = self._open_ticket(secret)
        known = record.nodes.get(digest)
        if known is None and len(record.nodes) >= record.uses:
            raise _invalid("is used up")
        if known is not None and _parsed(known.host) != address:
            raise Forbidden(f"this machine used the ticket as {known.host}", param="host", code="wrong_host")
        self._check_host(record, address)
        node = AdmittedNode(name, str(address), self._now_ms())
        self._keep(replace(record, nodes={**record.nodes, digest: node}))
        signed = self._authority.sign(key, [node.host], self._now(), self._life)
        return NodeCertificate(certificate_pem(signed).decode(), self._authority.pem.decode())

    async def renew(self, certificate: str, signed_at_ms: int, signature: str) -> NodeCertificate:
        text = renewal_text(signed_at_ms)
        key, record = self._member(certificate, text, signature, signed_at_ms)
        digest = key_digest(key)
        node = replace(record.nodes[digest], signed_at_ms=self._now_ms())
        self._check_host(record, _parsed(node.host))
        self._keep(replace(record, nodes={**record.nodes, digest: node}))
        signed = self._authority.sign(key, [node.host], self._now(), self._life)
        return NodeCertificate(certificate_pem(signed).decode(), self._authority.pem.decode())

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
        text = payout_text(node_id, payout, name, work_bytes_per_s, signed_at_ms)
        key, _ = self._member(certificate, text, signature, signed_at_ms)
        digest = key_digest(key)
        # Who passes a request on sees the id, and could have it enrolled for itself first.
        if not is_id_of(node_id, digest):
            raise Forbidden("this id is of another machine", param="node_id", code="foreign_node")
        # Who passes a request on could play it again after a later one.
        last_ms, last = self._payouts.get(node_id, (0, ""))
        if signed_at_ms < last_ms or (signed_at_ms == last_ms and text != last):
            raise Unauthenticated("the machine has signed another address since", param="signed_at_ms")
        assert self.pays is not None, "the books set it before they serve"
        await self.pays(node_id, payout, key_digest=digest, name=name, work_bytes_per_s=work_bytes_per_s)
        oldest_ms = self._now_ms() - FRESH_MS
        self._payouts = {one: kept for one, kept in self._payouts.items() if kept[0] >= oldest_ms}
        self._payouts[node_id] = (signed_at_ms, text)

    def _member(
        self, certificate: str, text: str, signature: str, signed_at_ms: int
    ) -> tuple[EllipticCurvePublicKey, TicketRecord]:
        """Return the key that signed a text just now, and the ticket that the machine came with last."""
        shown = read_certificate(certificate.encode())
        check_signed_text(
            self._authority.certificate,
            shown,
            text,
            signature,
            signed_at_ms=signed_at_ms,
            now=self._now(),
        )
        key = public_key(shown)
        digest = key_digest(key)
        # The ticket that it came with last counts.
        record = max(
            (one for one in self._records.values() if digest in one.nodes),
            key=lambda one: (one.nodes[digest].signed_at_ms, one.revoked_at_ms is None),
            default=None,
        )
        if record is None or record.revoked_at_ms is not None:
            raise Unauthenticated("the ticket of this node was revoked", code="invalid_ticket")
        return key, record

    def _open_ticket(self, secret: str) -> TicketRecord:
        record = self._records.get(_id_of(secret))
        if record is None or record.digest != _digest(secret):
            raise _invalid("is unknown")
        if record.revoked_at_ms is not None:
            raise _invalid("was revoked")
        if record.expires_at_ms <= self._now_ms():
            raise _invalid("has expired")
        return record

    def _check_host(self, record: TicketRecord, address: IPv4Address | IPv6Address) -> None:
        if (
            address in self._head_hosts
            or address.is_loopback
            or address.is_unspecified
            or address.is_multicast
        ):
            raise Forbidden(
                f"{address} is the head's; `azu up --workers` lends its machine",
                param="host",
                code="wrong_host",
            )
        if address not in ip_network(record.host):
            raise Forbidden(
                f"this ticket is for {record.host}, not {address}", param="host", code="wrong_host"
            )

    def _keep(self, record: TicketRecord) -> None:
        """Write a ticket to the disk before it counts, and forget those that no longer do."""
        kept = [one for one in self._records.values() if one.ticket_id != record.ticket_id]
        now_ms = self._now_ms()
        alive = [one for one in kept if one.counts_until_ms(self._life) > now_ms] + [record]
        with disk_errors(self._path.parent), replacing(self._path) as file:
            write_all(file, _RECORDS.dump_json(tuple(alive)))
        self._records = {one.ticket_id: one for one in alive}

    def _now_ms(self) -> int:
        return round(self._now().timestamp() * 1000)


def kept_authority(folder: Path, name: str, now: datetime) -> Authority:
    """Return an authority of the network, made where there is none.

    Raises ConfigurationError where its files are damaged.
    """
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    if not key.exists():
        new = Authority.new(f"azu {name}", now)
        # The key comes last: an authority without it is made anew.
        write_private(certificate, new.pem.decode())
        write_private(key, new.key_pem.decode())
    try:
        return Authority.load(certificate.read_bytes(), key.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the authority in {folder} is damaged; `azu up --rotate` makes another, and every node needs a "
            "new ticket"
        ) from error


def forget_members(folder: Path) -> None:
    """Remove the authorities and the tickets: no certificate and no ticket of before counts any more."""
    for name in (NODES, INGRESS):
        # The key goes first: without it the certificate is made anew.
        (folder / f"{name}.key").unlink(missing_ok=True)
        (folder / f"{name}.crt").unlink(missing_ok=True)
    (folder / _TICKETS).unlink(missing_ok=True)


def range_of(host: str) -> str:
    """Return an address or a range in CIDR's form; raises InvalidRequest for anything else."""
    try:
        return str(ip_network(host, strict=False))
    except ValueError as error:
        raise InvalidRequest(
            f"{host} is no address and no range of them, such as 10.0.0.7 or 10.0.0.0/24", param="host"
        ) from error


def _parsed(host: str) -> IPv4Address | IPv6Address:
    """Return an address, an IPv4 one also where it is written as IPv6."""
    try:
        address = ip_address(host)
    except ValueError as error:
        raise InvalidRequest(f"{host} is no address", param="host") from error
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _read(path: Path) -> dict[str, TicketRecord]:
    try:
        return {one.ticket_id: one for one in _RECORDS.validate_json(path.read_bytes())}
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        raise ConfigurationError(f"{path} is damaged; `azu up --rotate` begins without tickets") from error


def _invalid(why: str) -> Unauthenticated:
    return Unauthenticated(f"this ticket {why}; ask for a new one", code="invalid_ticket")


def _digest(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


def _id_of(secret: str) -> str:
    return f"ticket-{_digest(secret)[:_ID_DIGITS]}"
