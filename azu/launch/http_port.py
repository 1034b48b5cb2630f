"""The ingress's port: one network holds it, and one that is taken is refused before anything starts."""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from azu.errors import ConfigurationError, Conflict
from azu.launch.held import held

_CONNECT_TIMEOUT_S = 0.3
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def reached_at(host: str) -> str:
    """Return the address at which this machine itself reaches a listener at `host`."""
    return _EVERYWHERE.get(host, host)


@contextmanager
def http_port_held(host: str, port: int) -> Iterator[None]:
    """Hold the ingress's port for the network of this process; port 0, which takes a free one, is not held.

    Ray Serve lets several processes listen on one port, so that two networks could share it and answer in
    turns. Raises Conflict where the port is taken, ConfigurationError where this process may not have it.
    """
    if port == 0:
        yield
        return
    with held(f"http-{host}-{port}") as is_own:
        if not is_own:
            raise _taken(port, "another network of azu")
        _check(host, port)
        yield


def _check(host: str, port: int) -> None:
    with suppress(OSError):
        # What answers need not have bound the port here: a container's port is forwarded.
        socket.create_connection((reached_at(host), port), timeout=_CONNECT_TIMEOUT_S).close()
        raise _taken(port, "another program")
    try:
        # Without SO_REUSEPORT, so that no other process listens there.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _taken(port, "another program") from error
        advice = "set AZU_HTTP_PORT to 1024 or more" if error.errno == errno.EACCES else "set AZU_HTTP_HOST"
        raise ConfigurationError(
            f"nothing can listen at {host}, port {port}: {error.strerror}; {advice}"
        ) from error


def _taken(port: int, by: str) -> Conflict:
    return Conflict(f"port {port} is taken by {by}: set AZU_HTTP_PORT", param="AZU_HTTP_PORT")
