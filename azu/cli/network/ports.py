"""Ports on this machine."""

import socket
from urllib.parse import urlsplit

from azu.errors import Unavailable


def free_port() -> int:
    """Return a TCP port that nobody listens on now; bind it soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def address_towards(url: str) -> str:
    """Return the address of this machine that packets to a URL's host leave from; raises Unavailable."""
    target = urlsplit(url)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Nothing is sent: the kernel only chooses the way.
            probe.connect((target.hostname or "", target.port or 443))
            address: str = probe.getsockname()[0]
            return address
    except OSError as error:
        raise Unavailable(f"there is no way from this machine to {url}: {error}") from error
