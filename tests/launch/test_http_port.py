"""One network holds the ingress's port, whatever other processes do with it."""

import socket
from collections.abc import Iterator

import pytest

from azu.errors import ConfigurationError, Conflict
from azu.launch.http_port import http_port_held
from azu.launch.processes import free_port

HOST = "127.0.0.1"


@pytest.fixture
def shared() -> Iterator[socket.socket]:
    """A socket whose port other sockets may share, as that of Ray Serve."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((HOST, 0))
        yield listening


def test_a_port_is_held_by_one_network_at_a_time() -> None:
    port = free_port()

    with http_port_held(HOST, port), pytest.raises(Conflict, match="another network of azu"):
        http_port_held(HOST, port).__enter__()
    with http_port_held(HOST, port):
        pass


@pytest.mark.parametrize("host", [HOST, "0.0.0.0"])
def test_a_port_that_its_program_shares_is_taken_nevertheless(shared: socket.socket, host: str) -> None:
    shared.listen()
    port = shared.getsockname()[1]

    with pytest.raises(Conflict, match=f"port {port} is taken by another program: set AZU_HTTP_PORT"):
        http_port_held(host, port).__enter__()


def test_a_program_that_answers_nothing_has_taken_its_port(shared: socket.socket) -> None:
    # Bound and not listening: nothing connects.
    with pytest.raises(Conflict, match="is taken by another program"):
        http_port_held(HOST, shared.getsockname()[1]).__enter__()


def test_connections_of_a_network_that_ended_do_not_take_its_port() -> None:
    with socket.create_server((HOST, 0)) as ended:
        port = ended.getsockname()[1]
        client = socket.create_connection((HOST, port))
        ended.accept()[0].close()  # the end that closes first waits
        client.close()

    with http_port_held(HOST, port):
        pass


def test_an_address_of_another_machine_is_no_taken_port() -> None:
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1.*set AZU_HTTP_HOST"):
        http_port_held("192.0.2.1", free_port()).__enter__()


def test_any_number_of_networks_take_a_free_port() -> None:
    with http_port_held(HOST, 0), http_port_held(HOST, 0):
        pass
