"""Which network answers at a URL: its platform and authority, checked against an id that the caller knows."""

import ssl
from dataclasses import dataclass

import httpx

from azu.api.accounts import Platform
from azu.api.base import read
from azu.auth.network_id import ID_DIGITS, Succession, network_id
from azu.auth.succession import platforms_of
from azu.client.http import json_of, translated, trusting_only
from azu.errors import InvalidRequest, Unauthenticated

_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class KnownNetwork:
    """A network as it shows itself; `network_id` is computed from the rest, never taken from its word.

    `former` are the addresses that the platform had before; `is_changed` if the expected id is of one.
    """

    url: str
    network_id: str
    platform: str
    authority: str | None
    former: tuple[str, ...] = ()
    is_changed: bool = False

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

    The id may be that of an address whose own key has signed which one replaced it. Without an expected id
    its certificate has to be trusted by `tls`, or by the system without that.
    """
    # With an id the answer proves itself, and the request holds no secret.
    verify: ssl.SSLContext | bool = False if expected_id else (tls or True)
    with translated(), httpx.Client(base_url=url, timeout=_TIMEOUT_S, verify=verify) as http:
        shown = read(Platform, json_of(http.get("/v1/platform")))
    found = network_id(shown.address, shown.authority)
    platform, *former = platforms_of(shown.address.lower(), successions_of(shown))
    is_changed = bool(expected_id) and any(network_id(one, shown.authority) == expected_id for one in former)
    if expected_id and found != expected_id and not is_changed:
        raise Unauthenticated(f"the network at {url} has the id {found}, not {expected_id}: do not use it")
    # As one certificate, whatever else the text held.
    authority = (
        None
        if shown.authority is None
        else ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(shown.authority))
    )
    return KnownNetwork(url, found, platform, authority, tuple(former), is_changed)


def successions_of(shown: Platform) -> list[Succession]:
    """Return what a network says of its platform's keys; the signatures are still to be checked."""
    return [Succession(one.old, one.new, one.by_old, one.by_new) for one in shown.successions]
