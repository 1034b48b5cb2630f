"""A network on a Ray cluster that azu does not start or stop, such as one of `ray up`: `azu serve`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from azu.config import ControlConfig, NetworkFile, Settings
from azu.errors import Unavailable
from azu.launch import serving
from azu.launch.admin import AdminFacts, admin_file_kept
from azu.launch.kept_access import kept_access
from azu.launch.membership import head_answers
from azu.launch.serving import Progress
from azu.launch.sidecars import Sidecars, sidecars_running


@dataclass(frozen=True, slots=True)
class AttachedNetwork:
    """A running network and how to reach it; `head` is the address of the cluster's head ("host:port")."""

    url: str
    chain_url: str
    platform_address: str
    network_id: str
    admin_key: str = field(repr=False)
    head: str
    _sidecars: Sidecars = field(repr=False)
    _config: ControlConfig = field(repr=False)

    def revive(self) -> list[str]:
        """Start again the processes and actors that died, and return their names.

        Raises Unavailable when the cluster's head does not answer.
        """
        if not head_answers(self.head):
            raise Unavailable(f"the Ray head at {self.head} is gone")
        return self._sidecars.revive() + serving.revive(self._config)


@contextmanager
def attached_network(
    settings: Settings,
    file: NetworkFile,
    address: str,
    progress: Progress,
    others_payout: str | None = None,
) -> Iterator[AttachedNetwork]:
    """Run a network on the Ray cluster at `address` until the context is left.

    Everything that azu started is stopped then; the cluster stays. Nodes may join and leave at any time.
    Raises Conflict when a network runs in the same home or the ingress's port is taken, Unavailable or
    DeadlineExceeded when a process does not come up.
    """
    timeout_s = file.policy.timeouts.start_s
    progress("Starting Redis, the chain, the books and the treasury")
    with sidecars_running(settings, file.policy, others_payout) as sidecars:
        access = kept_access(settings)
        config = serving.control_config(
            settings,
            file.policy,
            sidecars.chain,
            sidecars.redis,
            sidecars.books,
            access.http_port,
            access.admin_key,
        )
        progress(f"Starting the control plane in the cluster at {address}")
        with serving.connected(address, settings.home / "logs", {}) as head, serving.port_held(config):
            network = AttachedNetwork(
                url=serving.local_url(config),
                chain_url=sidecars.chain.url,
                platform_address=sidecars.chain.platform_address,
                network_id=config.network_id,
                admin_key=access.admin_key,
                head=head,
                _sidecars=sidecars,
                _config=config,
            )
            try:
                serving.stop()  # a network that was killed may have left actors
                serving.start(config, serving.ingress_config(config, sidecars.redis, sidecars.books))
                # A cluster that grows on demand has no workers yet.
                client = serving.local_client(config, access.admin_key)
                serving.wait_until_up(client, timeout_s, network.revive, accepts_prompts=False)
                facts = AdminFacts.of(config, network.url, access.admin_key, "its owner runs Ray")
                with admin_file_kept(settings.home, facts):
                    yield network
            finally:
                if head_answers(head):
                    serving.stop()
