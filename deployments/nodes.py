"""How machines become nodes of an encrypted network: tickets, certificates and their renewal."""

import asyncio
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Depends

from azu.api.base import Revoked
from azu.api.network import (
    AuthorityResponse,
    EnrolRequest,
    NewTicket,
    NodeAdmission,
    RenewRequest,
    TicketList,
    TicketRequest,
    TicketResponse,
)
from azu.auth.certificates import (
    Authority,
    certificate_pem,
    check_text,
    key_digest,
    public_key,
    read_certificate,
    read_request,
    renewal_text,
    utc_now,
)
from azu.clock import wall_clock_ms
from azu.config import EnrolmentConfig
from azu.errors import InternalError, NotFound, Unauthenticated
from deployments.services import Admin, ServicesNow

router = APIRouter(prefix="/v1/nodes")
# An older signature may have been recorded by another party.
_FRESH_MS = 300_000


def enrolment_of(services: ServicesNow) -> EnrolmentConfig:
    """Return how nodes are let in; raises NotFound for a network without encryption."""
    if services.config.enrolment is None:
        raise NotFound("this network is not encrypted: `azu join` needs nothing but its ticket")
    return services.config.enrolment


Enrolment = Annotated[EnrolmentConfig, Depends(enrolment_of)]


@router.get("/authority")
async def authority(enrolment: Enrolment) -> AuthorityResponse:
    """Return the certificate of the nodes' authority."""
    signer = await asyncio.to_thread(_authority, enrolment)
    return AuthorityResponse(certificate=signer.pem.decode())


@router.post("/enrol")
async def enrol(body: EnrolRequest, services: ServicesNow, enrolment: Enrolment) -> NodeAdmission:
    """Let in a node that shows a ticket's secret, and sign its certificate."""
    key = read_request(body.request.encode())
    await services.tickets.admit(body.secret, key_digest(key), body.name, wall_clock_ms())
    signer = await asyncio.to_thread(_authority, enrolment)
    signed = signer.sign(key, [str(body.host)], utc_now())
    return await _admission(enrolment, signer, certificate_pem(signed))


@router.post("/renew")
async def renew(body: RenewRequest, services: ServicesNow, enrolment: Enrolment) -> NodeAdmission:
    """Give a node that shows its certificate a later one, unless its ticket was revoked."""
    signer = await asyncio.to_thread(_authority, enrolment)
    certificate = read_certificate(body.certificate.encode())
    signer.check(certificate, utc_now())
    check_text(certificate, renewal_text(body.signed_at_ms), body.signature)
    if abs(wall_clock_ms() - body.signed_at_ms) > _FRESH_MS:
        raise Unauthenticated("the signature is too old or from the future; set the machine's clock")
    await services.tickets.check_node(key_digest(public_key(certificate)))
    return await _admission(enrolment, signer, certificate_pem(signer.renew(certificate, utc_now())))


@router.post("/tickets", dependencies=[Admin])
async def new_ticket(body: TicketRequest, services: ServicesNow, enrolment: Enrolment) -> NewTicket:
    """Return a new ticket with its secret, which the network does not keep, and what else a node needs."""
    now = wall_clock_ms()
    secret, ticket = await services.tickets.new(body.label, body.uses, now, now + 1000 * body.expires_in_s)
    return NewTicket(
        **asdict(ticket), secret=secret, url=enrolment.url, network_id=services.config.network_id
    )


@router.get("/tickets", dependencies=[Admin])
async def tickets(services: ServicesNow) -> TicketList:
    """Return every ticket with the nodes that it let in."""
    found = await services.tickets.list()
    return TicketList(data=tuple(map(TicketResponse.model_validate, found)))


@router.delete("/tickets/{ticket_id}", dependencies=[Admin])
async def revoke_ticket(ticket_id: str, services: ServicesNow) -> Revoked:
    """Let no more nodes in with a ticket, and renew no certificate of its nodes."""
    await services.tickets.revoke(ticket_id, wall_clock_ms())
    return Revoked(revoked=ticket_id)


async def _admission(enrolment: EnrolmentConfig, signer: Authority, certificate: bytes) -> NodeAdmission:
    token = await asyncio.to_thread(enrolment.token_path.read_text)
    return NodeAdmission(
        certificate=certificate.decode(), authority=signer.pem.decode(), token=token, head=enrolment.head
    )


def _authority(enrolment: EnrolmentConfig) -> Authority:
    try:
        return Authority.load(enrolment.authority.read_bytes(), enrolment.authority_key.read_bytes())
    except (OSError, ValueError) as error:
        raise InternalError("the network's authority cannot be read") from error
