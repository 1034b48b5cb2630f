"""Which address a request comes from, where proxies stand between its client and the ingress."""

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address

from azu.units import KIB

# Only azu's own reverse proxy sets it: it replaces what a client sent.
PEER_HEADER = "x-azu-peer"
# It passes on a body of this size only once it has all of it.
WHOLE_BODY_BYTES = 8 * KIB
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
