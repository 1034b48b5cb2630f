"""How a machine becomes a node of an encrypted network: it comes with a ticket and gets a certificate."""

import ssl
from typing import Any

import httpx

from azu.api.base import read
from azu.api.network import NodeAdmission
from azu.client.http import fingerprint, raise_for, translated
from azu.errors import InternalError, Unauthenticated

_TIMEOUT_S = 30.0


def fetch_authority(url: str, sha256: str) -> str:
    """Return the certificate (PEM) of a network's authority, which must have this fingerprint.

    Raises Unauthenticated when it has another: somebody else answers there.
    """
    # Whoever answers may be anybody: nothing is told, and what is heard is checked.
    with translated(), httpx.Client(base_url=url, timeout=_TIMEOUT_S, verify=False) as http:  # noqa: S501
        pem = str(_object(http.get("/v1/nodes/authority")).get("certificate", ""))
    if fingerprint(pem) != sha256:
        raise Unauthenticated(f"the network at {url} is not the one that the ticket is for")
    return pem


def enrol(
    url: str, trust: ssl.SSLContext, *, secret: str, name: str, host: str, request_pem: str
) -> NodeAdmission:
    """Show a ticket's secret and return what it opens; `host` is where others reach the node.

    Raises Unauthenticated when the ticket lets nobody in any more.
    """
    body = {"secret": secret, "name": name, "host": host, "request": request_pem}
    return _ask(url, trust, "/v1/nodes/enrol", body)


def renew(
    url: str, trust: ssl.SSLContext, *, certificate_pem: str, signed_at_ms: int, signature: str
) -> NodeAdmission:
    """Show a certificate and return a later one, and what opens the cluster now.

    `signature` is that of the certificate's key under `renewal_text`. Raises Unauthenticated when the
    certificate has ended or the ticket that it came with was revoked.
    """
    body = {"certificate": certificate_pem, "signed_at_ms": signed_at_ms, "signature": signature}
    return _ask(url, trust, "/v1/nodes/renew", body)


def _ask(url: str, trust: ssl.SSLContext, path: str, body: dict[str, Any]) -> NodeAdmission:
    with translated(), httpx.Client(base_url=url, timeout=_TIMEOUT_S, verify=trust) as http:
        return read(NodeAdmission, _object(http.post(path, json=body)))


def _object(response: httpx.Response) -> dict[str, Any]:
    raise_for(response)
    try:
        found = response.json()
    except ValueError as error:
        raise InternalError("the network's answer is no JSON") from error
    if not isinstance(found, dict):
        raise InternalError("the network's answer is no object")
    return found
