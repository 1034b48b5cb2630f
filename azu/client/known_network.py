"""Which network answers at a URL: its platform and authority, checked against an id that the caller knows."""

import ssl
from dataclasses import dataclass

import httpx

from azu.api.accounts import Platform
from azu.api.base import read
from azu.auth.network_id import ID_DIGITS, network_id
from azu.client.http import json_of, translated, trusting_only
from azu.errors import InvalidRequest, Unauthenticated

_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class KnownNetwork:
    """A network as it shows itself; `network_id` is computed from the rest, never taken from its word."""

    url: str
    network_id: str
    platform: str
    authority: str | None

    def trust(self) -> ssl.SSLContext | None:
        """Return the context that trusts the network's own authority alone; None without one."""
        return None if self.authority is None else trusting_only(self.authority)


def split_id(address: str) -> tuple[str, str]:
    """Return the URL of "URL#ID" and the id, which is empty when there is none; raises InvalidRequest."""
    url, _, found = address.partition("#")
    found = found.lower()
    if found and (len(found) != ID_DIGITS or found.strip("0123456789abcdef")):
        raise InvalidRequest(
            f"a network's id is {ID_DIGITS} hex digits, as `azu up` prints it", param="network"
        )
    return url.rstrip("/"), found


def known_network(url: str, expected_id: str = "", *, tls: ssl.SSLContext | None = None) -> KnownNetwork:
    """Return the network at a URL; raises Unauthenticated where it has another id than the expected one.

    Without an expected id its certificate has to be trusted by `tls`, or by the system without that.
    """
    # With an id the answer proves itself, and the request holds no secret.
    verify: ssl.SSLContext | bool = False if expected_id else (tls or True)
    with translated(), httpx.Client(base_url=url, timeout=_TIMEOUT_S, verify=verify) as http:
        shown = read(Platform, json_of(http.get("/v1/platform")))
    found = network_id(shown.address, shown.authority)
    if expected_id and found != expected_id:
        raise Unauthenticated(f"the network at {url} has the id {found}, not {expected_id}: do not use it")
    # As one certificate, whatever else the text held.
    authority = (
        None
        if shown.authority is None
        else ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(shown.authority))
    )
    return KnownNetwork(url, found, shown.address.lower(), authority)
