"""What the network's meters show, for Prometheus; it needs none of Ray's agents."""

import hashlib
import hmac
from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.responses import Response

from azu.errors import Unauthenticated
from azu.metrics.exposition import CONTENT_TYPE, exposition
from azu.metrics.meter import Picture
from deployments.accounts import ServicesNow

router = APIRouter()


@router.get("/metrics")
async def metrics(services: ServicesNow, authorization: Annotated[str | None, Header()] = None) -> Response:
    """Return all metrics; needs the admin key unless the network's owner opened them."""
    if not services.config.open_metrics:
        check_admin(authorization, services.config.admin_key_sha256)
    picture: Picture = await services.scheduler("picture")
    return Response(exposition(picture), headers={"content-type": CONTENT_TYPE})


def check_admin(authorization: str | None, admin_key_sha256: str) -> None:
    """Raise Unauthenticated unless the header carries the admin key."""
    if not is_admin(authorization, admin_key_sha256):
        raise Unauthenticated("this endpoint needs the admin key")


def is_admin(authorization: str | None, admin_key_sha256: str) -> bool:
    """Say whether the header carries the admin key."""
    _, _, bearer = (authorization or "").partition(" ")
    given = hashlib.sha256(bearer.encode()).hexdigest()
    return hmac.compare_digest(given, admin_key_sha256)
