"""How a machine becomes a node of an encrypted network: it shows a ticket and gets a certificate."""

import ssl
from dataclasses import asdict
from typing import Any

import httpx

from azu.api.base import read
from azu.api.network import NodeAdmission, NodePayout, RestartResponse
from azu.client.http import json_of, translated
from azu.protocol.versions import own_versions

_TIMEOUT_S = 30.0


def enrol(
    url: str, trust: ssl.SSLContext, *, secret: str, name: str, host: str, request_pem: str
) -> NodeAdmission:
    """Show a ticket's secret and return what it opens; `host` is where other nodes reach this one.

    Raises Unauthenticated if the ticket is unknown, used up, expired or revoked, OtherVersion for a release
    of azu that the network does not understand.
    """
    body = {"secret": secret, "name": name, "host": host, "request": request_pem, "versions": _versions()}
    return _ask(url, trust, "/v1/nodes/enrol", body)


def renew(
    url: str, trust: ssl.SSLContext, *, certificate_pem: str, signed_at_ms: int, signature: str
) -> NodeAdmission:
    """Show a certificate and return a later one, with what opens the cluster now.

    The certificate's key signs `renewal_text`. Raises Unauthenticated if the certificate has expired or its
    ticket was revoked, and OtherVersion as `enrol` does.
    """
    body = {
        "certificate": certificate_pem, "signed_at_ms": signed_at_ms, "signature": signature,
        "versions": _versions(),
    }  # fmt: skip
    return _ask(url, trust, "/v1/nodes/renew", body)


def ask_restart(
    url: str, trust: ssl.SSLContext, *, certificate_pem: str, signed_at_ms: int, signature: str, name: str
) -> RestartResponse:
    """Ask for the turn of a node to be started again; the certificate's key signs `restart_text`."""
    body = {
        "certificate": certificate_pem, "signed_at_ms": signed_at_ms, "signature": signature, "name": name
    }  # fmt: skip
    with translated(), httpx.Client(base_url=url, timeout=_TIMEOUT_S, verify=trust) as http:
        return read(RestartResponse, json_of(http.post("/v1/nodes/restart", json=body)))


def set_payout(url: str, trust: ssl.SSLContext, body: dict[str, Any]) -> None:
    """Have the work of a node be paid to an address; `body` is that of a PayoutRequest.

    Raises Unauthenticated if the certificate has expired or its ticket was revoked.
    """
    with translated(), httpx.Client(base_url=url, timeout=_TIMEOUT_S, verify=trust) as http:
        read(NodePayout, json_of(http.post("/v1/nodes/payout", json=body)))


def _versions() -> dict[str, Any]:
    return asdict(own_versions())


def _ask(url: str, trust: ssl.SSLContext, path: str, body: dict[str, Any]) -> NodeAdmission:
    with translated(), httpx.Client(base_url=url, timeout=_TIMEOUT_S, verify=trust) as http:
        return read(NodeAdmission, json_of(http.post(path, json=body)))
