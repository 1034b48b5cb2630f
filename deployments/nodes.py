"""How machines become and stay nodes of an encrypted network: the books decide, this passes on."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends

from azu.addresses import parse_address
from azu.api.network import (
    EnrolRequest,
    NodeAdmission,
    NodePayout,
    PayoutRequest,
    RenewRequest,
    RestartRequest,
    RestartResponse,
)
from azu.auth.certificates import check_signed_text, hosts_of, read_certificate, restart_text, utc_now
from azu.auth.tickets import NodeCertificate
from azu.config import EnrolmentConfig, NodeLinks
from azu.errors import NotFound
from azu.protocol.versions import own_versions
from deployments.services import ServicesNow

router = APIRouter(prefix="/v1/nodes")
_WITHOUT_TICKETS = {
    NodeLinks.LOCAL: "this network is not encrypted: only its own machine joins, with what `azu up` printed",
    NodeLinks.FOREIGN: "azu did not start this Ray cluster: its owner adds nodes to it, without tickets",
}


def enrolment_of(services: ServicesNow) -> EnrolmentConfig:
    """Return how nodes are let in; raises NotFound for a network that has no tickets."""
    if services.config.enrolment is None:
        raise NotFound(_WITHOUT_TICKETS[services.config.nodes], code="no_tickets")
    return services.config.enrolment


Enrolling = Annotated[EnrolmentConfig, Depends(enrolment_of)]


@router.post("/enrol")
async def enrol(body: EnrolRequest, services: ServicesNow, enrolment: Enrolling) -> NodeAdmission:
    """Let in a node that shows a ticket's secret, and return its certificate."""
    own_versions().check_node(body.versions)
    signed = await services.members.enrol(body.secret, body.name, str(body.host), body.request)
    return await _admission(enrolment, signed)


@router.post("/renew")
async def renew(body: RenewRequest, services: ServicesNow, enrolment: Enrolling) -> NodeAdmission:
    """Give a node that shows its certificate a later one, unless its ticket was revoked."""
    own_versions().check_node(body.versions)
    signed = await services.members.renew(body.certificate, body.signed_at_ms, body.signature)
    return await _admission(enrolment, signed)


@router.post("/restart")
async def restart(body: RestartRequest, services: ServicesNow, enrolment: Enrolling) -> RestartResponse:
    """Give a node its turn to be started again with a new certificate, unless another node has it.

    The caller shows the machine's certificate, and asks again until the node has `left`.
    """
    certificate = read_certificate(body.certificate.encode())
    check_signed_text(
        read_certificate(await asyncio.to_thread(enrolment.authority.read_bytes)),
        certificate,
        restart_text(body.name, body.signed_at_ms),
        body.signature,
        signed_at_ms=body.signed_at_ms,
        now=utc_now(),
    )
    turn, left = await services.scheduler("restart", body.name, hosts_of(certificate))
    return RestartResponse(turn=turn, left=left)


@router.post("/payout")
async def payout(body: PayoutRequest, services: ServicesNow, _: Enrolling) -> NodePayout:
    """Have the books pay for a node's work to an address that the machine's own key signed."""
    address = parse_address(body.payout, param="payout")
    await services.members.set_payout(
        body.certificate,
        body.node_id,
        address,
        body.name,
        body.work_bytes_per_s,
        body.signed_at_ms,
        body.signature,
    )
    return NodePayout(node_id=body.node_id, payout=address)


async def _admission(config: EnrolmentConfig, signed: NodeCertificate) -> NodeAdmission:
    token = await asyncio.to_thread(config.token_path.read_text)
    return NodeAdmission(
        certificate=signed.certificate, authority=signed.authority, token=token, head=config.head
    )
