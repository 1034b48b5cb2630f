"""A network on a Ray cluster that somebody else brings up and down, such as `ray up`."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from azu.config import ControlConfig, NetworkFile, Settings
from azu.errors import Unavailable
from azu.launch import serving
from azu.launch.processes import free_port
from azu.launch.sidecars import Sidecars, admin_key_of, books_kept

Progress = Callable[[str], None]
_LOOK_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class AttachedNetwork:
    """A running network and how to reach it. `head` is where the cluster's head is ("host:port")."""

    url: str
    chain_url: str
    platform_address: str
    admin_key: str = field(repr=False)
    head: str
    _books: Sidecars = field(repr=False)
    _config: ControlConfig = field(repr=False)

    def revive(self) -> list[str]:
        """Start again which processes and actors died, and return their names; Unavailable without a head."""
        if not _listens(self.head):
            raise Unavailable(f"the Ray head at {self.head} is gone")
        return self._books.revive() + serving.revive(self._config)


@contextmanager
def attached_network(
    settings: Settings, file: NetworkFile, address: str, progress: Progress
) -> Iterator[AttachedNetwork]:
    """Run a network on the Ray cluster at `address` until the context is left.

    Whatever azu started is gone then and the cluster stays. Nodes may come and go at any time. Raises
    Conflict when a network runs in the same home, Unavailable or DeadlineExceeded when something does not
    come up.
    """
    timeout_s = file.policy.timeouts.start_s
    progress("Starting Redis, the chain and the treasury")
    with books_kept(settings, timeout_s) as books:
        admin_key = admin_key_of(settings)
        config = serving.control_config(
            settings, file.policy, books.chain, books.redis, settings.http_port or free_port(), admin_key
        )
        progress(f"Starting the control plane in the cluster at {address}")
        with serving.connected(address, settings.home / "logs", {}) as head:
            network = AttachedNetwork(
                url=serving.local_url(config),
                chain_url=books.chain.url,
                platform_address=books.chain.platform_address,
                admin_key=admin_key,
                head=head,
                _books=books,
                _config=config,
            )
            try:
                serving.stop()  # what a network left that was killed
                serving.start(config, books.redis.ingress)
                # A cluster that grows when it is asked has no workers yet.
                serving.wait_until_it_answers(serving.local_client(config), timeout_s, network.revive)
                yield network
            finally:
                if _listens(head):
                    serving.stop()


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_LOOK_TIMEOUT_S).close()
    except OSError:
        return False
    return True
