"""Which address a request comes from, where proxies stand between its client and the ingress."""

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from azu.units import KIB

# Only azu's own reverse proxy sets it: it replaces what a client sent.
PEER_HEADER = "x-azu-peer"
# It passes on a body of this size only once it has all of it.
WHOLE_BODY_BYTES = 8 * KIB
# An answer with it was given before the ingress had the whole body.
UNREAD_HEADER = "x-azu-unread"
Network = IPv4Network | IPv6Network


def client_address(peer: str, forwarded: str, trusted: Sequence[Network]) -> str:
    """Return the address that a request came from.

    `peer` is the address at the other end of the connection, `forwarded` the content of X-Forwarded-For. That
    counts from a trusted proxy alone: the last address in it that is no trusted proxy itself. The others may
    be the client's own words.
    """
    for named in (peer, *reversed(forwarded.split(","))):
        try:
            address = ip_address(named.strip())
        except ValueError:
            break
        # An IPv4 client of a listener for IPv6.
        address = getattr(address, "ipv4_mapped", None) or address
        peer = str(address)
        if not any(address in network for network in trusted):
            break
    return peer


def network_of(address: str) -> str:
    """Return what one client has of addresses: of IPv6 a /64, else the address itself."""
    try:
        is_v6 = ip_address(address).version == 6
    except ValueError:
        return address
    return str(ip_network(f"{address.partition('%')[0]}/64", strict=False)) if is_v6 else address
