"""The checks of `azu doctor`: findings about this machine, its Redis, and the network that it uses.

Packages of the `node` extra are imported inside the checks: one of them may be what is missing.
"""

import os
import platform
import resource
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx

from azu.cli.credentials import no_key, url_of
from azu.client import Client
from azu.client.http import trusting, trusting_this
from azu.client.machine import trust_at
from azu.config import NodeLinks, Settings
from azu.errors import AzuError, LedgerError, NotFound, Unauthenticated
from azu.launch.admin import AdminFacts, admin_facts
from azu.launch.http_port import reached_at
from azu.launch.membership import TlsFiles
from azu.units import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from redis import Redis

    from azu.launch.redis_server import Store

_LEAST_REDIS = (6, 2)
_MOST_SKEW_S = 5.0
_SOON = timedelta(days=14)
_TIMEOUT_S = 5.0
_SECRET_NAMES = (
    "*.key", "*.json", "ray-token", "ticket*", "redis*/redis.conf", "tls/*.key", "ingress/*.key",
    "books/*.key", "networks/*/*.key",
)  # fmt: skip
_SEE_LOGS = "look into logs/ under the head's AZU_HOME"


class Severity(StrEnum):
    """BAD keeps azu from working, or its money or secrets from being safe; UNKNOWN could not be checked."""

    OK = "ok"
    WARNING = "warning"
    BAD = "bad"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked: its state, and what to do if that is not well."""

    about: str
    state: Severity
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings of one run."""

    machine: tuple[Finding, ...]
    network: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is bad."""
        return all(finding.state is not Severity.BAD for finding in (*self.machine, *self.network))


Check = Callable[[Settings], Iterable[Finding]]


def diagnose(settings: Settings) -> Diagnosis:
    """Run every check."""
    machine = [one for name, check in MACHINE_CHECKS.items() for one in run_check(name, check, settings)]
    return Diagnosis(tuple(machine), tuple(run_check("network", check_network, settings)))


def run_check(name: str, check: Check, settings: Settings) -> list[Finding]:
    """Return the findings of a check; a check that fails is a finding itself, so that the others run."""
    try:
        return list(check(settings))
    except AzuError as error:
        return [Finding(name, Severity.BAD, error.message, "mend that first")]
    except ModuleNotFoundError as error:
        told = f"{error.name} is missing"
        return [Finding(name, Severity.UNKNOWN, told, "to serve or lend: pip install 'azu[node]'")]
    except Exception as error:
        return [Finding(name, Severity.UNKNOWN, f"{type(error).__name__}: {error}", "look at it by hand")]


def _result(about: str, good: bool, found: str, advice: str, otherwise: Severity = Severity.BAD) -> Finding:
    """Return a finding that is OK without advice, or `otherwise` with it."""
    return Finding(about, Severity.OK, found) if good else Finding(about, otherwise, found, advice)


def _python(_: Settings) -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    here, wanted = platform.python_version(), metadata("azu")["Requires-Python"]
    yield _result("Python", here in SpecifierSet(wanted), here, f"use a Python {wanted}")


def _packages(_: Settings) -> Iterator[Finding]:
    """Check the packages of a machine that serves or lends."""
    from packaging.requirements import Requirement

    wrong = []
    for wanted in map(Requirement, requires("azu") or ()):
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": "node"}):
            continue
        try:
            found = version(wanted.name).partition("+")[0]
        except PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
        else:
            if not wanted.specifier.contains(found, prereleases=True):
                wrong.append(f"{wanted.name} {found}, not {wanted.specifier}")
    told = "; ".join(wrong) or "all there, in their ranges"
    yield _result("packages", not wrong, told, "pip install 'azu[node]'")


def _gpu(_: Settings) -> Iterator[Finding]:
    """Check the GPUs, their driver, and that torch was built for them."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        has_card = any(Path("/proc/driver").glob("nvidia*")) or shutil.which("nvidia-smi") is not None
        advice = "install the NVIDIA driver, or restart after its update"
        yield _result("GPU", not has_card, f"none ({error}); the CPU can be lent", advice)
        return
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            card = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(card)
            free = f"{format_bytes(memory.free)} of {format_bytes(memory.total)} free"
            told = f"{pynvml.nvmlDeviceGetName(card)}, {free}, driver {pynvml.nvmlSystemGetDriverVersion()}"
            yield Finding(f"GPU {index}", Severity.OK, told)
    finally:
        pynvml.nvmlShutdown()
    if (torch := version("torch")).endswith("+cpu"):
        yield Finding("torch", Severity.BAD, f"{torch} cannot use the GPU", "install torch's CUDA build")


def _capacity(settings: Settings) -> Iterator[Finding]:
    """Check memory, disk and the limit of open files."""
    import psutil

    home = next(folder for folder in (settings.home, *settings.home.parents) if folder.exists())
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(home).free
    shared = shutil.disk_usage("/dev/shm").free  # noqa: S108 - Ray's own place
    for about, free, least_bytes, advice in (
        ("memory", memory, 2 * GIB, "stop other programs: a stage keeps up to 1 GiB of what it sent"),
        ("disk", disk, 10 * GIB, f"shards are kept in {home}: make room, or set AZU_HOME to a larger disk"),
        ("shared memory", shared, 256 * MIB, "make /dev/shm larger (docker run --shm-size=1g) for Ray"),
    ):
        yield _result(about, free >= least_bytes, f"{format_bytes(free)} free", advice, Severity.WARNING)
    # Every connection is an open file.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = f"ulimit -n {min(hard, 65_536)}"
    yield _result("open files", soft >= 4096, f"at most {soft}", advice, Severity.WARNING)


def _port(settings: Settings) -> Iterator[Finding]:
    about, host = f"port {settings.http_port}", settings.http_host
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, settings.http_port))
        except OSError as error:
            is_own = (settings.home / "admin.json").exists()
            told = "taken by the network that runs here" if is_own else f"{host}: {error.strerror}"
            advice = "stop the program that listens there, or set AZU_HTTP_PORT (or AZU_HTTP_HOST)"
            yield _result(about, is_own, told, advice, Severity.WARNING)
        else:
            yield Finding(about, Severity.OK, f"free at {host}")


def _key_files(settings: Settings) -> Iterator[Finding]:
    """Check that only their owner can read the files with keys and passwords."""
    homes = (settings.home, settings.money_home)
    files = sorted({path for name in _SECRET_NAMES for home in homes for path in home.glob(name)})
    if named := os.environ.get("AZU_PRIVATE_KEY_FILE"):
        files.append(Path(named))
    exposed = [path for path in files if path.exists() and path.stat().st_mode & 0o077]
    for path in exposed:
        yield Finding("key file", Severity.BAD, f"others can read {path}", f"chmod 600 {path}")
    if not exposed:
        yield Finding("key files", Severity.OK, f"{len(files)} in {settings.home}, read by their owner alone")


def _redis(settings: Settings) -> Iterator[Finding]:
    """Check the Redis of REDIS_HOST, or the two of the network that runs here."""
    from azu.launch.redis_server import BOOKS_STORE, JOB_STORE, own_redis_url

    if settings.redis_url is not None:
        told = "holds the books and the jobs: it flushes each token too"
        yield Finding("REDIS_HOST", Severity.OK, told)
        yield from _store(settings, settings.redis_url, BOOKS_STORE)
        return
    for store, home in ((BOOKS_STORE, settings.money_home), (JOB_STORE, settings.jobs_home)):
        try:
            url = own_redis_url(home, store)
        except NotFound:
            yield Finding("Redis", Severity.OK, "none yet: `azu up` starts its own")
            return
        yield from _store(settings, url, store)


def _store(settings: Settings, url: str, store: "Store") -> Iterator[Finding]:
    """Check one Redis; what is flushed when it acknowledges matters for money."""
    from redis import Redis
    from redis.exceptions import RedisError

    from azu.launch.redis_server import BOOKS_STORE

    advice = "AZU_REDIS_TLS=1 (and AZU_REDIS_CA for an authority of your own)"
    yield _link("Redis link", url, "money and keys cross the network in the clear", advice)
    with Redis.from_url(url, socket_timeout=3.0, socket_connect_timeout=3.0, decode_responses=True) as client:
        try:
            server, persistence = client.info("server"), client.info("persistence")
        except RedisError as error:
            is_own = settings.redis_url is None and not (settings.home / "admin.json").exists()
            told = "azu's own, not running" if is_own else str(error)
            advice = "start it, and check REDIS_HOST, REDIS_PORT and REDIS_PASSWORD"
            yield _result(store.title, is_own, told, advice)
            if store is BOOKS_STORE:
                yield from _append_only_file(settings.money_home / store.name)
        else:
            found = server["redis_version"]
            is_new = tuple(map(int, found.split(".")[:2])) >= _LEAST_REDIS
            yield _result(store.title, is_new, found, "use 6.2 or later")
            yield _persistence(persistence)
            yield _durability(client, store)


def _append_only_file(folder: Path) -> Iterator[Finding]:
    """Check that the ledger's files of a stopped network end with a whole transfer."""
    from azu.money.ledger.durability import append_only_files, torn_file

    try:
        files = append_only_files(folder)
        if not files[0].exists():
            return
        is_whole = torn_file(files) is None
    except (LedgerError, OSError) as error:
        yield Finding("append-only file", Severity.BAD, str(error), "restore it from a copy")
        return
    told = "whole to its last byte" if is_whole else "its tail is torn, as by a crash of the machine"
    yield _result("append-only file", is_whole, told, "azu ledger repair")


def _persistence(found: Mapping[str, Any]) -> Finding:
    if not found["aof_enabled"]:
        return Finding("append-only file", Severity.BAD, "off", "CONFIG SET appendonly yes")
    writes = ("aof_last_write_status", "aof_last_bgrewrite_status")
    failed = [name for name in writes if found.get(name, "ok") != "ok"]
    told = f"{', '.join(failed)} failed" if failed else "on, its last write went well"
    return _result("append-only file", not failed, told, "look at the disk of Redis: it could not write")


def _durability(client: "Redis", store: "Store") -> Finding:
    from redis.exceptions import RedisError

    # The file's name is up to Redis's owner; the ledger counts on the other settings.
    names = [name for name in store.config if name != "appendfilename"]
    try:
        # One name at a time: Redis 6 takes no more.
        found = {name: client.config_get(name).get(name) for name in names}
    except RedisError as error:
        told = f"this user may not read it: {error}"
        return Finding("durability", Severity.UNKNOWN, told, "ask Redis's owner")
    wrong = [name for name, value in found.items() if value not in (store.config[name], None)]
    told = ", ".join(f"{name} is {found[name]!r}" for name in wrong) or store.promise
    advice = "; ".join(f'CONFIG SET {name} "{store.config[name]}"' for name in wrong)
    return _result("durability", not wrong, told, advice)


MACHINE_CHECKS: Mapping[str, Check] = {
    "Python": _python,
    "packages": _packages,
    "GPU": _gpu,
    "capacity": _capacity,
    "port": _port,
    "key files": _key_files,
    "Redis": _redis,
}


def check_network(settings: Settings) -> Iterator[Finding]:
    """Check the network that runs here, or the one at AZU_URL."""
    try:
        facts = admin_facts(settings.home)
    except NotFound:
        url, is_expected = url_of(settings), settings.url is not None
        tls = trusting(settings.tls_ca) if settings.tls_ca else trust_at(settings.home, url)
    else:
        yield from _users(facts)
        yield from _listeners(settings.home)
        url, is_expected = facts.url, True
        tls = None if facts.certificate is None else trusting_this(facts.certificate)
    with httpx.Client(base_url=url, timeout=_TIMEOUT_S, verify=tls or True) as http:
        started_s = time.time()
        try:
            health = http.get("/health")
        except httpx.TransportError as error:
            # A machine that uses no network yet has no fault.
            state = Severity.BAD if is_expected else Severity.WARNING
            advice = "`azu up` starts a network here; AZU_URL says where another one is"
            told = f"no network answers at {url}"
            if "Connection refused" not in str(error):
                told = f"{url}: {error}"
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                advice = "`azu login URL#ID`, as its owner's `azu up` printed it"
            yield Finding("ingress", state, told, advice)
        else:
            serves = health.status_code == 200
            told = f"{url} {'serves' if serves else 'is still starting, or has no control plane'}"
            yield _result("ingress", serves, told, f"wait, then {_SEE_LOGS}", Severity.WARNING)
            for problem in health.json().get("problems", ()):
                yield Finding("ingress", Severity.BAD, problem, "docs/operations.md, When something fails")
            yield from _clock(health, started_s, time.time())
            platform_facts = http.get("/v1/platform").json()
            yield _azu_version(platform_facts.get("version"))
            yield from _encryption(url, platform_facts)
            yield from _nodes(url, tls)
    yield from _own_certificates(settings)


def _clock(reply: httpx.Response, sent_s: float, received_s: float) -> Iterator[Finding]:
    if "date" not in reply.headers:
        return
    # The header has whole seconds.
    theirs_s = parsedate_to_datetime(reply.headers["date"]).timestamp()
    skew_s = max(sent_s - theirs_s - 1.0, theirs_s - received_s, 0.0)
    good = skew_s <= _MOST_SKEW_S
    told = "agrees with the network's" if good else f"{skew_s:.0f} s from the network's"
    yield _result("clock", good, told, "set both by NTP: signatures and certificates are good for a time")


def _azu_version(theirs: str | None) -> Finding:
    ours = version("azu")
    told = ours if theirs == ours else f"{ours} here, {theirs or 'unknown'} there"
    advice = "install the same version on both"
    return _result("azu's version", theirs == ours, told, advice, Severity.WARNING)


def _users(facts: AdminFacts) -> Iterator[Finding]:
    """Check that no member of the cluster can take the money of the network that runs here."""
    if not facts.why_one_user:
        yield Finding("Unix users", Severity.OK, "money and Ray have a user each")
    elif facts.nodes is NodeLinks.FOREIGN:
        advice = "run Ray as another user than `azu serve`"
        yield Finding("Unix users", Severity.WARNING, "azu did not start Ray, nor choose its user", advice)
    elif facts.nodes is NodeLinks.ENCRYPTED:
        told = f"one for everything ({facts.why_one_user}): each member could take all money"
        advice = "start it as root, or admit only machines that you trust with it"
        yield Finding("Unix users", Severity.BAD, told, advice)
    else:
        yield Finding("Unix users", Severity.OK, f"one for everything: {facts.why_one_user}")


def _listeners(home: Path) -> Iterator[Finding]:
    """List where the network that runs here takes connections; what others reach has to speak TLS."""
    from azu.launch.footprint import uses_of
    from azu.launch.network_process import running_network

    try:
        uses = uses_of(running_network(home))
    except NotFound:
        return  # it was killed a moment ago
    found: dict[str, dict[str, set[int]]] = {}
    for use in uses:
        for host, port in use.listens:
            found.setdefault(host, {}).setdefault(use.title, set()).add(port)
    for host, by_title in sorted(found.items()):
        about, told = f"listens at {host}", "; ".join(_named(*one) for one in sorted(by_title.items()))
        if ip_address(host).is_loopback:
            yield Finding(about, Severity.OK, told)
            continue
        plain = sorted(port for ports in by_title.values() for port in ports if not _speaks_tls(host, port))
        advice = f"not encrypted: {', '.join(map(str, plain))}; see AZU_HTTP_HOST, or keep others out"
        yield _result(about, not plain, told, advice)


def _named(title: str, ports: set[int]) -> str:
    return f"{title} {', '.join(map(str, sorted(ports))) if len(ports) < 3 else f'{len(ports)} ports'}"


def _speaks_tls(host: str, port: int) -> bool:
    """Say whether what listens there answers a TLS handshake, be it by asking for a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with (
            socket.create_connection((reached_at(host), port), timeout=_TIMEOUT_S) as plain,
            context.wrap_socket(plain),
        ):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except OSError:
        return False


def _encryption(url: str, shown: Mapping[str, Any]) -> Iterator[Finding]:
    """Check each kind of connection between machines for encryption."""
    if url.startswith("https://"):
        parts = urlsplit(url)
        # Read without checking who signed it.
        pem = ssl.get_server_certificate((parts.hostname or "", parts.port or 443), timeout=_TIMEOUT_S)
        yield _expiry("ingress link", "encrypted", pem.encode(), "a new certificate is due")
    else:
        advice = "`azu up --ip ADDRESS`, or AZU_TLS_CERT and AZU_TLS_KEY"
        yield _link("ingress link", url, "keys and prompts can be read", advice)
    match shown.get("nodes"):
        case NodeLinks.ENCRYPTED:
            yield Finding("between nodes", Severity.OK, "encrypted, both ends show a certificate")
        case NodeLinks.LOCAL:
            told, advice = "all on the head's machine", "with others: `azu up --ip ADDRESS`"
            yield Finding("between nodes", Severity.OK, told, advice)
        case _:
            told = (
                "azu did not start this Ray cluster: it gives no tickets, and cannot tell what is encrypted"
            )
            advice = "keep it in one private network, or use `azu up --ip ADDRESS`"
            yield Finding("between nodes", Severity.WARNING, told, advice)
    chain_url = shown.get("chain_url", "")
    advice = "HYPERLIQUID_RPC_URL=https://..."
    yield _link("chain link", chain_url, "balances can be forged", advice, Severity.WARNING)
    told = "never encrypted: it listens on the head's loopback only, and asks for the cluster's token"
    yield Finding("Ray's dashboard", Severity.OK, told, "from elsewhere: ssh -L 8265:127.0.0.1:8265")


def _link(about: str, url: str, risk: str, advice: str, otherwise: Severity = Severity.BAD) -> Finding:
    """Return a finding about a connection, which is well if it is encrypted or stays on this machine."""
    host = urlsplit(url).hostname
    if url.startswith(("https://", "rediss://")):
        return Finding(about, Severity.OK, f"encrypted, to {host}")
    is_local = _is_this_machine(url)
    told = "not encrypted, but within this machine" if is_local else f"not encrypted, to {host}: {risk}"
    return _result(about, is_local, told, advice, otherwise)


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _nodes(url: str, tls: ssl.SSLContext | None) -> Iterator[Finding]:
    try:
        client = Client(url, tls=tls, timeout_s=_TIMEOUT_S)
        if not client.has_key:
            raise no_key(url)
        nodes = client.network().nodes
    except Unauthenticated:
        yield Finding("nodes", Severity.UNKNOWN, "no key to ask with", "azu login")
        return
    except AzuError as error:
        yield Finding("nodes", Severity.WARNING, error.message, _SEE_LOGS)
        return
    if not nodes:
        yield Finding("nodes", Severity.WARNING, "none: no model can run", "`azu join TICKET`, or --workers")
    for node in nodes:
        told, advice = f"{node.state}, {node.device}", "see what `azu join` prints on its machine"
        is_good = node.state in ("alive", "left", "paused")
        yield _result(f"node {node.name}", is_good, told, advice, Severity.WARNING)


def _own_certificates(settings: Settings) -> Iterator[Finding]:
    """Check how long the certificates of this machine are valid."""
    made = "start the network again: that makes a new one"
    renewed = "`azu join` renews it by itself while it runs"
    nodes = [(TlsFiles.of(path), "node's", renewed) for path in sorted(settings.home.glob("networks/*"))]
    head = (TlsFiles.of(settings.home / "tls"), "head's", made)
    ingress = (TlsFiles.of(settings.home / "ingress", "ingress"), "ingress's", made)
    for files, whose, advice in (head, ingress, *nodes):
        if files.certificate.exists():
            content = files.certificate.read_bytes()
            yield _expiry(f"{whose} certificate", f"in {files.certificate.parent}", content, advice)


def _now() -> datetime:
    return datetime.now(UTC)


def _expiry(about: str, found: str, certificate_pem: bytes, advice: str) -> Finding:
    from azu.auth.certificates import read_certificate

    certificate, now = read_certificate(certificate_pem), _now()
    ends = certificate.not_valid_after_utc
    state = Severity.BAD if ends <= now else Severity.WARNING
    soon = min(_SOON, (ends - certificate.not_valid_before_utc) / 4)
    return _result(about, ends - now >= soon, f"{found}, until {ends:%Y-%m-%d}", advice, state)
