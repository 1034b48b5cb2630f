"""A whole network on this machine, from Redis to the ingress: `azu up` and `azu demo`."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from azu.config import ControlConfig, LocalWorker, NetworkFile, Settings, load_network
from azu.errors import ConfigurationError, Unavailable
from azu.files import CONFIGS, write_private
from azu.launch.admin import admin_file_kept, first_ticket
from azu.launch.membership import AnyTicket, Ticket, head_files
from azu.launch.network_process import home_locked
from azu.launch.processes import ProcessGroup, free_port
from azu.launch.ray_nodes import HEAD, STARTED, RayHost, Worker, driver_environment, socket_folder
from azu.launch.serving import (
    Progress,
    connected,
    control_config,
    ingress_config,
    local_client,
    local_url,
    revive,
    start,
    wait_until_up,
)
from azu.launch.sidecars import (
    BOOKS,
    BOOKS_READY,
    TREASURY,
    TREASURY_READY,
    admin_key_of,
    choose_chain,
    start_books,
    start_stores_and_devnet,
    start_treasury,
)

DEMO = CONFIGS / "demo.yaml"


@dataclass(frozen=True, slots=True)
class LocalNetwork:
    """A running network and how to reach it.

    `authority` is the certificate that clients of an encrypted network have to trust.
    """

    url: str
    redis_url: str = field(repr=False)
    books_url: str = field(repr=False)
    chain_url: str
    platform_address: str
    network_id: str
    admin_key: str = field(repr=False)
    authority: Path | None
    dashboard_url: str | None
    ticket: AnyTicket = field(repr=False)
    _processes: tuple[ProcessGroup, ...] = field(repr=False)
    _config: ControlConfig = field(repr=False)

    def fund(self, address: str, lamports: int) -> None:
        """Give an address HYPE from the devnet's faucet."""
        from azu.devnet.faucet import fund

        fund(self.chain_url, address, lamports)

    def revive(self) -> list[str]:
        """Start again the processes and control plane actors that died, and return their names.

        Raises Unavailable when Ray's head died: what the network kept in memory is lost with it.
        """
        return _revive(self._processes) + revive(self._config)


@contextmanager
def demo_network(
    home: Path, progress: Progress, file: NetworkFile | None = None, *, ip: str | None = None
) -> Iterator[LocalNetwork]:
    """Run the demo's network in the folder `home`, without regard to this machine's settings.

    `file` replaces the demo's network file; `ip` is the address at which other machines reach this one.
    """
    settings = Settings.from_environment().model_copy(
        update={
            "home": home,
            "network": DEMO,
            "http_host": "127.0.0.1",
            "http_port": free_port(),
            "domain": None,
            "chain_url": None,
            "redis_host": None,
        }
    )
    with local_network(settings, file or load_network(DEMO), progress, ip=ip) as network:
        yield network


@contextmanager
def local_network(
    settings: Settings,
    file: NetworkFile,
    progress: Progress,
    *,
    ip: str | None = None,
    dashboard: bool = False,
    tls: bool = False,
) -> Iterator[LocalNetwork]:
    """Run a network until the context is left; everything that it started is stopped then.

    `ip` is the address at which other machines reach this one. With `tls`, which needs `ip`, every connection
    between machines is encrypted, and the ingress listens at `ip` unless the settings name another address.
    Raises Conflict when a network runs in the same home, Unavailable or DeadlineExceeded with the last output
    of the process that did not come up.
    """
    if tls and ip is None:
        raise ConfigurationError("an encrypted network needs the address that others reach it at", param="ip")
    logs, timeout_s = settings.home / "logs", file.policy.timeouts.start_s
    token_path, token = settings.home / "ray-token", secrets.token_hex(32)
    with (
        home_locked(settings.home),
        socket_folder(settings.home / "ray") as ray_folder,
        ProcessGroup(logs) as services,
        ProcessGroup(logs) as treasury,
        ProcessGroup(logs) as nodes,
    ):
        progress("Starting Redis, the chain and Ray's head")
        write_private(token_path, token)
        files = None
        if tls:
            settings = _with_http_host(settings, ip)
            files = head_files(settings.home / "tls", _hosts(settings, ip))
        port, dashboard_port = free_port(), free_port() if dashboard else None
        host = RayHost(ray_folder, token_path, ip, dashboard_port, files)
        nodes.start(host.head(port))
        chain = choose_chain(settings)
        redis = start_stores_and_devnet(services, settings, chain, timeout_s)
        books = start_books(services, settings, chain, redis.books)
        nodes.wait_until_printed(HEAD, STARTED, timeout_s)
        progress("Starting the workers, the books and the treasury")
        head = f"{ip or '127.0.0.1'}:{port}"
        _start_workers(nodes, host, head, file.workers)
        start_treasury(treasury, settings, chain, redis)
        services.wait_until_printed(BOOKS, BOOKS_READY, timeout_s)
        treasury.wait_until_printed(TREASURY, TREASURY_READY, timeout_s)
        for worker in file.workers:
            nodes.wait_until_printed(worker.name, STARTED, timeout_s)
        admin_key = admin_key_of(settings)
        http_port = settings.http_port or free_port()
        config = control_config(settings, file.policy, chain, redis, books, http_port, admin_key, host, head)
        progress("Starting the control plane")
        with connected(head, logs, driver_environment(token_path, files)) as address:
            start(config, ingress_config(config, redis, books))
            progress("Waiting until it serves")
            client = local_client(config, admin_key)
            processes = (services, treasury, nodes)
            wait_until_up(client, timeout_s, lambda: _revive(processes), accepts_prompts=bool(file.workers))
            network = LocalNetwork(
                url=local_url(config),
                redis_url=redis.jobs_owner,
                books_url=books.url("owner"),
                chain_url=chain.url,
                platform_address=chain.platform_address,
                network_id=config.network_id,
                admin_key=admin_key,
                authority=None if files is None else files.authority,
                dashboard_url=f"http://127.0.0.1:{dashboard_port}" if dashboard else None,
                ticket=first_ticket(client)
                if tls
                else Ticket(address=address, token=token, network=config.network_id),
                _processes=processes,
                _config=config,
            )
            with admin_file_kept(settings.home, network.url, admin_key, config.tls):
                yield network


def _with_http_host(settings: Settings, ip: str | None) -> Settings:
    if "http_host" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"http_host": ip})


def _hosts(settings: Settings, ip: str | None) -> list[str]:
    """Return the names and addresses of the head for its certificate."""
    names = [] if settings.domain is None else [settings.domain.rpartition(":")[0] or settings.domain]
    return [str(ip), settings.http_host, *names]


def _revive(groups: Sequence[ProcessGroup]) -> list[str]:
    if any(HEAD in group.ended() for group in groups):
        raise Unavailable(f"{HEAD} ended; start the network again")
    return [name for group in groups for name in group.revive()]


def _start_workers(nodes: ProcessGroup, host: RayHost, head: str, workers: Sequence[LocalWorker]) -> None:
    for index, worker in enumerate(workers):
        cuda_device = None if worker.device == "cpu" else worker.device.removeprefix("cuda:")
        nodes.start(host.worker(head, Worker(index, worker.name, worker.vram, worker.payout, cuda_device)))
