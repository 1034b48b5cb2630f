"""The plain processes beside a network's Ray cluster: Redis, books, devnet, signer and treasury."""

import asyncio
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from azu.auth.network_id import PLATFORMS_FILE
from azu.auth.tickets import Admission
from azu.config import NetworkPolicy, Settings
from azu.config.network import Limit
from azu.errors import ConfigurationError
from azu.files import write_private
from azu.launch.formats import claim_store
from azu.launch.network_process import home_locked
from azu.launch.network_users import DEVNET_CHAIN
from azu.launch.processes import ProcessGroup, ProcessSpec, azu_command, free_port
from azu.launch.redis_server import RedisUrls, start_stores
from azu.money.chain.networks import network_at
from azu.money.treasury.environment import take_variable
from azu.money.wire import Access

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount

    from azu.auth.network_id import Succession
    from azu.money.books import Books, BooksTerms
    from azu.money.signer.calls import RemoteSigner
    from azu.money.signer.policy import PayoutLimit

DEVNET = "devnet"
BOOKS = "books"
SIGNER = "signer"
TREASURY = "treasury"
# What they print once they are ready.
DEVNET_READY = r"^devnet ready "
BOOKS_READY = r"^books ready$"
SIGNER_READY = r"^signer ready$"
TREASURY_READY = r"^treasury ready$"
_BOOKS_FILE = "books.json"
_BOOKS_CALLERS = ("ingress", "scheduler", "treasury", "signer", "owner")
_SIGNER_FILE = "signer-calls.json"
_SIGNER_CALLERS = ("treasury", "books", "owner")
# How long earnings wait on a real chain where the network's owner says nothing else.
_MATURE_S = 86_400
# Nodes that have no key are enrolled by the owner of the books' machine.
_OWN_NODES = "owner"
# The books answer nothing else to their owner while they audit.
_AUDIT_S = 600.0
_DEVNET_FILE = "devnet.json"
_DEVNET_ADMIN = "devnet-admin.key"
SIGNER_MEMORY = "signer.json"
# The variables by which processes get the URLs of the job store, of the books and of the signer.
JOBS_URL, BOOKS_URL, SIGNER_URL = "AZU_JOBS_REDIS_URL", "AZU_BOOKS_URL", "AZU_SIGNER_URL"
_KEY = "SCHEDULER_PRIVATE_KEY"
_KEY_FILE = "AZU_PRIVATE_KEY_FILE"


@dataclass(frozen=True, slots=True)
class ChainSettings:
    """The chain's URL, the platform's address there, and the variables that give its key to the signer.

    The wallets of `admins` sign the commands that move money. `successions` say which key of the platform
    replaced which.
    """

    url: str
    platform_address: str
    is_devnet: bool
    signer_key: Mapping[str, str] = field(repr=False)
    admins: tuple[str, ...] = ()
    successions: "tuple[Succession, ...]" = ()


@dataclass(frozen=True, slots=True)
class Sidecars:
    """The running processes: the chain, the others, and where each process finds Redis and the books."""

    chain: ChainSettings
    redis: RedisUrls
    books: Access
    _groups: tuple[ProcessGroup, ...] = field(repr=False)

    def revive(self) -> list[str]:
        """Start again the processes that ended, and return their names."""
        return [name for group in self._groups for name in group.revive()]


@contextmanager
def sidecars_running(
    settings: Settings, policy: NetworkPolicy, others_payout: str | None = None
) -> Iterator[Sidecars]:
    """Run what a network needs beside a Ray cluster that azu did not start, until the context is left.

    Nodes of such a cluster are not enrolled; their work is paid to `others_payout`, or held. Raises Conflict
    when a network runs in the same home, Unavailable or DeadlineExceeded with the last output of the process
    that did not come up.
    """
    logs, timeout_s = settings.home / "logs", policy.timeouts.start_s
    with home_locked(settings.home), ProcessGroup(logs) as services, ProcessGroup(logs) as treasury:
        chain = choose_chain(settings)
        redis = start_stores_and_devnet(services, settings, chain, services, settings.home, timeout_s)
        terms = books_terms(policy, chain, others_payout)
        books = start_books(services, settings, chain, redis.books, terms)
        signer = start_signer(services, settings, chain, books)
        start_treasury(treasury, settings, chain, redis, books, signer)
        wait_for_money(services, chain, timeout_s)
        treasury.wait_until_printed(TREASURY, TREASURY_READY, timeout_s)
        yield Sidecars(chain, redis, books, (services, treasury))


def start_stores_and_devnet(
    services: ProcessGroup,
    settings: Settings,
    chain: ChainSettings,
    of_jobs: ProcessGroup,
    home_of_jobs: Path,
    timeout_s: float,
) -> RedisUrls:
    """Start Redis and a devnet unless they are configured; returns the URLs of Redis for each process.

    Redis answers then, and the devnet once `wait_for_money` returns. The Redis of jobs is a process of the
    group `of_jobs`, and keeps its data in `home_of_jobs`.
    """
    if chain.is_devnet:
        start_devnet(services, settings, chain)
    if settings.redis_url is None:
        urls = start_stores(services, settings.home, of_jobs, home_of_jobs, timeout_s)
    else:
        claim_store(settings.redis_url)
        urls = RedisUrls.same(settings.redis_url)
    return urls


def start_devnet(services: ProcessGroup, settings: Settings, chain: ChainSettings) -> None:
    """Start the devnet, which goes on where it was; it answers once it has printed DEVNET_READY."""
    port, file = str(urlsplit(chain.url).port), str(settings.home / DEVNET_CHAIN)
    command = azu_command("devnet", "--port", port, "--file", file)
    services.start(ProcessSpec(DEVNET, command, dict(os.environ), restart=True))


def start_books(
    services: ProcessGroup,
    settings: Settings,
    chain: ChainSettings,
    redis_url: str,
    terms: "BooksTerms",
    admission: Admission | None = None,
) -> Access:
    """Start the books with new secrets for their callers, and for those of the signer.

    They serve once they have printed BOOKS_READY.

    With an `admission` they admit nodes: the key of the nodes' authority lies with them.
    """
    access, signer = Access.new(free_port(), _BOOKS_CALLERS), Access.new(free_port(), _SIGNER_CALLERS)
    access.write(settings.home / _BOOKS_FILE)
    # Here, because each of the two calls the other.
    signer.write(settings.home / _SIGNER_FILE)
    environment = _environment(settings, chain, redis_url) | {SIGNER_URL: signer.url("books")}
    admits = () if admission is None else ("--admission", admission.to_json())
    command = azu_command("books", "--terms", json.dumps(asdict(terms)), *admits)
    services.start(ProcessSpec(BOOKS, command, environment, restart=True))
    return access


def books_terms(
    policy: NetworkPolicy, chain: ChainSettings, others_payout: str | None = None
) -> "BooksTerms":
    """Return by what a network's books reckon; on a local chain earnings wait only if its owner says so."""
    from azu.money.books import BooksTerms

    mature_s = policy.earnings_mature_s
    if mature_s is None:
        mature_s = 0 if chain.is_devnet else _MATURE_S
    return BooksTerms(
        lamports_per_token_layer=policy.price.lamports_per_token_layer,
        platform_percent=policy.price.platform_percent,
        reservation_ttl_ms=policy.limits.reservation_ttl_s * 1000,
        max_keys=policy.limits.max_keys,
        max_nodes=policy.limits.max_nodes,
        max_unfunded_keys=policy.limits.max_unfunded_keys,
        unfunded_key_ms=policy.limits.unfunded_key_s * 1000,
        fetch_lamports_per_gib=policy.new_models.lamports_per_gib,
        fetch_unused_ms=policy.new_models.unused_s * 1000,
        # Those of lost jobs stay open until they expire.
        max_reservations=2 * policy.limits.max_jobs_in_flight * policy.limits.most_times_more,
        key_day_lamports=policy.limits.key_day_lamports,
        maturity_ms=mature_s * 1000,
        others_payout=others_payout,
        admins=chain.admins,
    )


def books_access(home: Path) -> Access:
    """Return where the books of a home folder are reached; raises NotFound where no network ever ran."""
    return Access.read(home / _BOOKS_FILE)


def owners_books(home: Path) -> "Books":
    """Return the books of a home folder's network for its owner; raises NotFound where none ever ran."""
    from azu.money.books import Books

    return Books(books_access(home).url("owner"), silence_s=_AUDIT_S)


def enrol_own_node(home: Path, name: str, payout: str, node_id: str, work_bytes_per_s: int) -> None:
    """Have the work of one of this machine's nodes be paid to an address; raises Unavailable, NotFound."""

    async def enrol() -> None:
        books = owners_books(home)
        try:
            await books.enrol_node(
                node_id, payout, key_digest=_OWN_NODES, name=name, work_bytes_per_s=work_bytes_per_s
            )
        finally:
            await books.close()

    asyncio.run(enrol())


def start_signer(group: ProcessGroup, settings: Settings, chain: ChainSettings, books: Access) -> Access:
    """Start the signer, the only process that gets the platform's key; return where it is called."""
    environment = {**_chain_environment(settings, chain), **chain.signer_key}
    environment |= {"AZU_ADMIN_ADDRESSES": ",".join(chain.admins), BOOKS_URL: books.url("signer")}
    environment.pop("REDIS_PASSWORD", None)
    group.start(ProcessSpec(SIGNER, azu_command("signer"), environment, restart=True))
    return signer_access(settings.home)


def wait_for_money(services: ProcessGroup, chain: ChainSettings, timeout_s: float) -> None:
    """Wait until books and signer answer calls, and the devnet where there is one."""
    if chain.is_devnet:
        services.wait_until_printed(DEVNET, DEVNET_READY, timeout_s)
    services.wait_until_printed(BOOKS, BOOKS_READY, timeout_s)
    services.wait_until_printed(SIGNER, SIGNER_READY, timeout_s)


def signer_access(home: Path) -> Access:
    """Return where the signer of a home folder is called; raises NotFound where no network ever ran."""
    return Access.read(home / _SIGNER_FILE)


def platforms_in(home: Path, platform: str) -> tuple[str, ...]:
    """Return a platform's address and those that it had before; raises ConfigurationError for an old one."""
    from azu.auth.succession import platforms_of

    return platforms_of(platform, successions_in(home, platform))


def successions_in(home: Path, platform: str) -> "tuple[Succession, ...]":
    """Return which key of the platform replaced which; raises ConfigurationError for an old one."""
    from azu.auth.succession import read_successions, successor_of

    successions = read_successions(home / PLATFORMS_FILE)
    if (successor := successor_of(platform, successions)) is not None:
        raise ConfigurationError(f"the platform {platform} was replaced by {successor}: use its key")
    return successions


def payout_limit(limit: Limit) -> "PayoutLimit":
    """Return a limit of the network file as the signer's policy has it."""
    from azu.money.signer.policy import PayoutLimit

    return PayoutLimit(limit.hour_lamports, limit.day_lamports, limit.address_percent)


def start_treasury(
    group: ProcessGroup,
    settings: Settings,
    chain: ChainSettings,
    redis: RedisUrls,
    books: Access,
    signer: Access,
) -> None:
    """Start the treasury; it is ready once it has printed TREASURY_READY."""
    environment = _environment(settings, chain, redis.treasury)
    environment |= {
        JOBS_URL: redis.treasury_jobs,
        BOOKS_URL: books.url("treasury"),
        SIGNER_URL: signer.url("treasury"),
    }
    group.start(ProcessSpec(TREASURY, azu_command("treasury"), environment, restart=True))


def _environment(settings: Settings, chain: ChainSettings, redis_url: str) -> dict[str, str]:
    """Return the variables of a process that has a user of its own in Redis."""
    redis = urlsplit(redis_url)
    environment = _chain_environment(settings, chain) | {
        "REDIS_HOST": redis.hostname or "",
        "REDIS_PORT": str(redis.port),
        "AZU_REDIS_TLS": str(redis.scheme == "rediss"),
    }
    if redis.scheme != "rediss":
        environment.pop("AZU_REDIS_CA", None)
    if redis.password:
        environment |= {"REDIS_USERNAME": redis.username or "", "REDIS_PASSWORD": unquote(redis.password)}
    return environment


def _chain_environment(settings: Settings, chain: ChainSettings) -> dict[str, str]:
    """Return the variables of a process of money, without those of its own."""
    return dict(os.environ) | {
        "HYPERLIQUID_RPC_URL": chain.url,
        "HYPERLIQUID_ADDRESS": chain.platform_address,
        "AZU_HOME": str(settings.home),
        "AZU_NETWORK": str(settings.network or ""),
    }


def choose_chain(settings: Settings) -> ChainSettings:
    """Return the configured chain, or a devnet on a free port whose platform key is made here once.

    The key of a configured chain is not read here, only handed to the signer. In both cases it is removed
    from this process's environment. Raises ConfigurationError when it or the platform's address is missing,
    and for the key of a real chain that is not in a file.
    """
    taken = {name: take_variable(os.environ, name) for name in (_KEY, _KEY_FILE)}
    if settings.chain_url is None:
        return _devnet(settings)
    key = {name: value for name, value in taken.items() if value is not None}
    if settings.platform_address is None or not key:
        raise ConfigurationError(f"a chain needs HYPERLIQUID_ADDRESS and {_KEY_FILE}")
    if _KEY in key and network_at(settings.chain_url).name != DEVNET:
        raise ConfigurationError(f"the key of a real chain has to be in a file that {_KEY_FILE} names")
    return ChainSettings(
        settings.chain_url,
        settings.platform_address,
        is_devnet=False,
        signer_key=key,
        admins=settings.admin_addresses,
        successions=successions_in(settings.home, settings.platform_address),
    )


def _devnet(settings: Settings) -> ChainSettings:
    # A separate key: what it signs for a devnet is valid on the testnet too.
    path = settings.home / "devnet.key"
    address = _kept_wallet(path).address.lower()
    admin = _kept_wallet(settings.home / _DEVNET_ADMIN).address.lower()
    url = f"http://127.0.0.1:{free_port()}"
    write_private(settings.home / _DEVNET_FILE, json.dumps({"url": url, "platform_address": address}))
    return ChainSettings(
        url,
        address,
        is_devnet=True,
        signer_key={_KEY_FILE: str(path)},
        admins=(admin, *settings.admin_addresses),
        successions=successions_in(settings.home, address),
    )


def _kept_wallet(path: Path) -> "LocalAccount":
    from eth_account import Account

    if not path.exists():
        write_private(path, Account.create().key.hex())
    wallet: LocalAccount = Account.from_key(path.read_text())
    return wallet


def devnet_admin(home: Path) -> "LocalAccount | None":
    """Return the wallet that signs an admin's commands on the devnet of a home folder; None without one."""
    path = home / _DEVNET_ADMIN
    return _kept_wallet(path) if path.exists() else None


def owners_signer(home: Path) -> "RemoteSigner":
    """Return the signer of a home folder's network for its owner; raises NotFound where none ever ran."""
    from azu.money.signer.calls import RemoteSigner

    return RemoteSigner(signer_access(home).url("owner"))


def devnet_of(home: Path) -> ChainSettings | None:
    """Return the devnet that a network of this home folder started last; None if there is none."""
    try:
        known = json.loads((home / _DEVNET_FILE).read_text())
    except FileNotFoundError:
        return None
    return ChainSettings(known["url"], known["platform_address"], is_devnet=True, signer_key={})
