"""A whole network on this machine, from Redis to the ingress: `azu up` and `azu demo`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from azu.auth.enrolment import forget_members
from azu.auth.tickets import Admission
from azu.config import (
    ControlConfig,
    EnrolmentConfig,
    LocalWorker,
    NetworkFile,
    NetworkPolicy,
    NodeLinks,
    Settings,
    load_network,
)
from azu.errors import Unavailable
from azu.files import CONFIGS, write_private
from azu.launch.admin import AdminFacts, admin_file_kept, new_ticket
from azu.launch.control_process import CONTROL, CONTROL_READY, control_process
from azu.launch.http_port import http_port_held
from azu.launch.kept_access import kept_access
from azu.launch.membership import (
    LOOPBACK,
    AnyTicket,
    EnrolmentTicket,
    HeadFiles,
    Ticket,
    TlsFiles,
    head_files,
    members_folder,
)
from azu.launch.network_process import home_locked
from azu.launch.network_users import NetworkUsers, network_users
from azu.launch.processes import ProcessGroup, free_port, own_addresses, own_network
from azu.launch.ray_nodes import (
    HEAD,
    STARTED,
    RayHost,
    Worker,
    check_lent,
    driver_environment,
    inherited_environment,
    socket_folder,
)
from azu.launch.reverse_proxy import (
    REVERSE_PROXY,
    haproxy_configuration,
    haproxy_executable,
    listens,
    raise_open_files,
    reverse_proxy,
    write_certificate,
)
from azu.launch.serving import (
    Progress,
    connected,
    control_config,
    ingress_config,
    local_client,
    local_url,
    login_url,
    revive,
    start,
    wait_until_up,
)
from azu.launch.sidecars import (
    TREASURY,
    TREASURY_READY,
    books_terms,
    choose_chain,
    enrol_own_node,
    start_books,
    start_signer,
    start_stores_and_devnet,
    start_treasury,
    wait_for_money,
)

DEMO = CONFIGS / "demo.yaml"
_FIRST_TICKET_S = 86_400
# Where Ray's dashboard is by default.
_DASHBOARD_PORT = 8265


@dataclass(frozen=True, slots=True)
class LocalNetwork:
    """A running network and how to reach it; `direct_url` leads to Serve's proxy past the reverse proxy.

    Users sign in at `login_url`: it names the domain that the texts contain which they sign.
    `authority` is the certificate that clients of an encrypted network have to trust. `why_one_user` says why
    one user runs everything; it is empty where money, Ray and `azu up` have a user each. `no_ticket` says why
    there is no `ticket`. `token_file` has the token of Ray's cluster, for which its dashboard asks.
    """

    url: str
    login_url: str
    direct_url: str
    redis_url: str = field(repr=False)
    books_url: str = field(repr=False)
    chain_url: str
    platform_address: str
    network_id: str
    admin_key: str = field(repr=False)
    authority: Path | None
    dashboard_url: str | None
    token_file: Path
    ticket: AnyTicket | None = field(repr=False)
    no_ticket: str
    why_one_user: str
    _processes: tuple[ProcessGroup, ...] = field(repr=False)
    # None where the control process watches the actors.
    _config: ControlConfig | None = field(repr=False)

    def fund(self, address: str, lamports: int) -> None:
        """Give an address HYPE from the devnet's faucet."""
        from azu.devnet.faucet import fund

        fund(self.chain_url, address, lamports)

    def revive(self) -> list[str]:
        """Start again the processes and control plane actors that died, and return their names.

        Raises Unavailable when Ray's head died: what the network kept in memory is lost with it.
        """
        revived = _revive(self._processes)
        return revived if self._config is None else revived + revive(self._config)


@contextmanager
def demo_network(
    home: Path, progress: Progress, file: NetworkFile | None = None, *, ip: str | None = None
) -> Iterator[LocalNetwork]:
    """Run the demo's network in the folder `home`, without regard to this machine's settings.

    `file` replaces the demo's network file; `ip` is the address at which other machines reach this one, which
    may then join.
    """
    settings = Settings.from_environment().model_copy(
        update={
            "home": home,
            "network": DEMO,
            "http_host": ip or LOOPBACK,
            "http_port": free_port(),
            "domain": None,
            "chain_url": None,
            "redis_host": None,
        }
    )
    running = local_network(settings, file or load_network(DEMO), progress, ip=ip, trust_members=True)
    with running as network:
        yield network


@contextmanager
def local_network(
    settings: Settings,
    file: NetworkFile,
    progress: Progress,
    *,
    ip: str | None = None,
    dashboard: bool = False,
    trust_members: bool = False,
    rotate: bool = False,
    new_token: bool = False,
) -> Iterator[LocalNetwork]:
    """Run a network until the context is left; everything that it started is stopped then.

    `ip` is the address at which other machines reach this one. With it they can join, every connection
    between machines is encrypted, and the ingress listens at `ip` unless the settings name another address.
    `trust_members` makes tickets also where a member could take the money of all. With `rotate` no
    certificate and no ticket of before counts any more, with `new_token` no unencrypted ticket and no admin
    key. Raises Conflict when a network runs in the same home or the ingress's port is taken, Unavailable or
    DeadlineExceeded with the last output of the process that did not come up.
    """
    settings = with_http_host(settings, ip)
    logs, timeout_s = settings.home / "logs", file.policy.timeouts.start_s
    token_path, workers = settings.home / "ray-token", _lending(file.workers)
    raise_open_files()
    with (
        home_locked(settings.home),
        http_port_held(settings.http_host, settings.http_port),
        nullcontext(network_users(settings, others_join=ip is not None)) as users,
        socket_folder(users.ray_sessions, users.ray) as ray_folder,
        ProcessGroup(logs, user=users.money) as services,
        ProcessGroup(logs, user=users.money) as treasury,
        ProcessGroup(logs, user=users.ray) as of_jobs,
        ProcessGroup(logs, user=users.ray) as nodes,
    ):
        progress("Starting Redis, the chain and Ray's head")
        access = kept_access(settings, new_token=new_token or rotate)
        write_private(token_path, access.token)
        if rotate:
            forget_members(members_folder(users.money_home))
        own, shown = _certificates(settings, users, ip)
        admission = _admission(file.policy, ip, "" if trust_members else users.why_one)
        dashboard_port = free_port(_DASHBOARD_PORT) if dashboard else None
        host = RayHost(
            ray_folder,
            users.for_ray(token_path),
            ip or LOOPBACK,
            dashboard_port,
            None if shown is None else shown.ray,
            users.ray_home,
        )
        head = f"{host.ip}:{access.head_port}"
        nodes.start(host.head(access.head_port))
        of_money = _of_money(settings, users)
        chain = choose_chain(of_money)
        redis = start_stores_and_devnet(services, of_money, chain, of_jobs, users.jobs_home, timeout_s)
        terms = books_terms(file.policy, chain)
        books = start_books(services, of_money, chain, redis.books, terms, admission)
        signer = start_signer(services, of_money, chain, books)
        start_treasury(treasury, of_money, chain, redis, books, signer)
        progress("Starting the books, the signer, the treasury and the workers")
        wait_for_money(services, chain, timeout_s)
        # They wait for the head themselves, and come up while the control plane does.
        _start_workers(nodes, host, head, workers, of_money.home, settings.home / "speeds")
        nodes.wait_until_printed(HEAD, STARTED, timeout_s)
        config = control_config(
            _of_ray(settings, users), file.policy, chain, redis, books, access.http_port,
            access.admin_key, ip,
            None if shown is None else shown.ingress,
        )  # fmt: skip
        config = replace(config, dashboard_url=f"http://{LOOPBACK}:{dashboard_port}" if dashboard else None)
        config = _behind_proxy(_with_nodes(config, host, head), nodes, users, timeout_s)
        ingress = ingress_config(config, redis, books)
        progress("Starting the control plane")
        driver = driver_environment(host.token_path, host.tls, host.ip)
        with nullcontext() if users.ray else connected(head, logs, driver):
            if users.ray is None:
                start(config, ingress)
            else:
                nodes.start(control_process(users, config, ingress, head, inherited_environment() | driver))
                nodes.wait_until_printed(CONTROL, CONTROL_READY, timeout_s)
            progress("Waiting until it serves")
            treasury.wait_until_printed(TREASURY, TREASURY_READY, timeout_s)
            for worker in workers:
                nodes.wait_until_printed(worker.name, STARTED, timeout_s)
            client = local_client(config, access.admin_key)
            processes = (services, treasury, of_jobs, nodes)
            wait_until_up(client, timeout_s, lambda: _revive(processes), accepts_prompts=bool(workers))
            facts = AdminFacts.of(config, local_url(config), access.admin_key, users.why_one)
            network = LocalNetwork(
                url=facts.url,
                login_url=login_url(config),
                direct_url=facts.url
                if config.serve_port is None
                else f"http://{LOOPBACK}:{config.serve_port}",
                redis_url=redis.jobs_owner,
                books_url=books.url("owner"),
                chain_url=chain.url,
                platform_address=chain.platform_address,
                network_id=config.network_id,
                admin_key=access.admin_key,
                authority=None if own is None else own.ingress.authority,
                dashboard_url=config.dashboard_url,
                token_file=token_path,
                ticket=Ticket(port=access.head_port, token=access.token, network=config.network_id)
                if admission is None
                else _first_ticket(users.money_home, facts, host.ip, admission),
                no_ticket="" if admission is None else admission.makes_none,
                why_one_user=users.why_one,
                _processes=processes,
                _config=config if users.ray is None else None,
            )
            with admin_file_kept(settings.home, facts):
                yield network


def _behind_proxy(
    config: ControlConfig, group: ProcessGroup, users: NetworkUsers, timeout_s: float
) -> ControlConfig:
    """Start the reverse proxy, where there is one; returns the configuration of an ingress behind it."""
    executable = haproxy_executable()
    if executable is None:
        return config
    config = replace(config, serve_port=free_port())
    folder = users.home / "reverse-proxy"
    certificate = write_certificate(config, folder)
    readable = None if certificate is None else users.for_ray(certificate)
    configuration = folder / "haproxy.cfg"
    write_private(configuration, haproxy_configuration(config, readable))
    group.start(reverse_proxy(executable, users.for_ray(configuration)))
    ready = partial(listens, group.pid(REVERSE_PROXY), config.http_port)
    group.wait_until(REVERSE_PROXY, ready, timeout_s)
    return config


def with_http_host(settings: Settings, ip: str | None) -> Settings:
    """Return settings whose ingress listens at `ip`, if there is one, unless they name another address."""
    if ip is None or "http_host" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"http_host": ip})


def _certificates(
    settings: Settings, users: NetworkUsers, ip: str | None
) -> tuple[HeadFiles | None, HeadFiles | None]:
    """Return the head's certificates, and their files for Ray's processes; None where no machine joins."""
    if ip is None:
        return None, None
    own = head_files(settings.home, _hosts(settings, ip), members_folder(users.money_home))
    return own, HeadFiles(_for_ray(users, own.ray), _for_ray(users, own.ingress))


def _for_ray(users: NetworkUsers, files: TlsFiles) -> TlsFiles:
    """Return where Ray's processes can read a certificate's files."""
    if users.ray is None:
        return files
    copied = (
        users.text_for_ray(f"{path.parent.name}-{path.name}", path.read_text())
        for path in (files.certificate, files.key, files.authority)
    )
    return TlsFiles(*copied)


def _of_money(settings: Settings, users: NetworkUsers) -> Settings:
    """Return the settings of the processes of money, which can read what they name."""
    changed = {"home": users.money_home}
    if settings.network is not None and users.money is not None:
        changed["network"] = users.money_home / "network.yaml"
        write_private(changed["network"], settings.network.read_text())
    return settings.model_copy(update=changed)


def _of_ray(settings: Settings, users: NetworkUsers) -> Settings:
    """Return the settings of Ray's processes, which can read what they name."""
    changed = {"home": users.ray_home}
    for name in ("tls_cert", "tls_key"):
        if (path := getattr(settings, name)) is not None:
            changed[name] = users.for_ray(path)
    return settings.model_copy(update=changed)


def _hosts(settings: Settings, ip: str) -> list[str]:
    """Return the names and addresses of the head for its certificates."""
    names = [] if settings.domain is None else [settings.domain.rpartition(":")[0] or settings.domain]
    return [ip, settings.http_host, *names]


def _admission(policy: NetworkPolicy, ip: str | None, why_one: str) -> Admission | None:
    """Return how machines are admitted; `why_one` says why a member could take the money, if it could."""
    if ip is None:
        return None
    makes_none = f"one Unix user runs everything ({why_one}), so a member could take all money"
    return Admission(
        life_s=policy.certificates.node_s,
        head_hosts=tuple(sorted(own_addresses() | {ip})),
        makes_none=makes_none if why_one else "",
    )


def _first_ticket(
    money_home: Path, facts: AdminFacts, ip: str, admission: Admission
) -> EnrolmentTicket | None:
    """Return a ticket for one machine of the head's own network; None where there is no such network."""
    network = own_network(ip)
    if admission.makes_none or network is None:
        return None
    return new_ticket(
        money_home, facts, label="printed by azu up", uses=1, host=network, expires_in_s=_FIRST_TICKET_S
    )


def _with_nodes(config: ControlConfig, host: RayHost, head: str) -> ControlConfig:
    """Return the configuration with what it has to say of the nodes of a cluster that azu started."""
    if host.tls is None:
        return replace(config, nodes=NodeLinks.LOCAL)
    enrolment = EnrolmentConfig(f"https://{config.domain}", head, host.token_path, host.tls.authority)
    return replace(config, nodes=NodeLinks.ENCRYPTED, enrolment=enrolment)


def _revive(groups: Sequence[ProcessGroup]) -> list[str]:
    if any(HEAD in group.ended() for group in groups):
        raise Unavailable(f"{HEAD} ended; start the network again")
    return [name for group in groups for name in group.revive()]


def _start_workers(
    nodes: ProcessGroup,
    host: RayHost,
    head: str,
    workers: Sequence[Worker],
    money_home: Path,
    speeds: Path,
) -> None:
    def enrol(lends: Worker, node_id: str) -> None:
        speed = lends.work_bytes_per_s(speeds)
        enrol_own_node(money_home, lends.name, lends.payout_address, node_id, speed)

    for lends in workers:
        nodes.start(host.worker(head, lends, partial(enrol, lends)))


def _lending(workers: Sequence[LocalWorker]) -> list[Worker]:
    """Return the workers of a network file as they lend this machine; raises ConfigurationError."""
    from azu.engine.device import device_bytes

    lending = [
        Worker(
            index,
            one.name,
            one.vram,
            one.payout,
            None if one.device == "cpu" else one.device.removeprefix("cuda:"),
        )
        for index, one in enumerate(workers)
    ]
    check_lent(lending, device_bytes)
    return lending
