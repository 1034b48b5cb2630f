"""What `azu doctor` finds: one line for each thing it looked at, and what to do about it."""

import os
import re
import resource
import shutil
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from azu.client import Client
from azu.client.http import trusting, trusting_this
from azu.config import Settings
from azu.errors import AzuError, NotFound
from azu.launch.admin import admin_facts
from azu.launch.membership import TlsFiles
from azu.money.ledger.durability import APPEND_ONLY_FILE, DURABLE_CONFIG
from azu.units import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from redis import Redis


class Severity(StrEnum):
    """BAD keeps azu from working, or its money or secrets from being safe; UNKNOWN could not be looked at."""

    OK = "ok"
    WARNING = "warning"
    BAD = "bad"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: how it is, and what to do if that is not well."""

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
        return all(one.state is not Severity.BAD for one in (*self.machine, *self.network))


def looked(about: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return what a look finds; one that fails says why, and the others go on."""
    try:
        return list(look())
    except AzuError as error:
        return [Finding(about, Severity.BAD, error.message, "mend that first")]
    except Exception as error:
        return [Finding(about, Severity.UNKNOWN, f"{type(error).__name__}: {error}", "look at it by hand")]


_OLDEST = (6, 2)


def redis(settings: Settings) -> Iterator[Finding]:
    """Look at the Redis of REDIS_HOST, or that of the network that runs here."""
    from redis import Redis
    from redis.exceptions import RedisError

    from azu.launch.redis_server import own_redis_url

    try:
        url = settings.redis_url or own_redis_url(settings.home)
    except NotFound:
        yield Finding("Redis", Severity.OK, "none yet: `azu up` starts its own")
        return
    yield _link(url)
    with Redis.from_url(url, socket_timeout=3.0, socket_connect_timeout=3.0, decode_responses=True) as client:
        try:
            server = client.info("server")
            persistence = client.info("persistence")
        except RedisError as error:
            is_own = settings.redis_url is None and not (settings.home / "admin.json").exists()
            yield Finding(
                "Redis",
                Severity.OK if is_own else Severity.BAD,
                "azu's own, not running" if is_own else str(error),
                "" if is_own else "start it, and check REDIS_HOST, REDIS_PORT and REDIS_PASSWORD",
            )
            yield from _file(settings)
            return
        yield _redis_version(server["redis_version"])
        yield _append_only_file(persistence)
        yield from _configuration(client)


def _link(url: str) -> Finding:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "rediss":
        return Finding("Redis link", Severity.OK, f"encrypted, to {host}")
    if _is_this_machine(host):
        return Finding("Redis link", Severity.OK, "not encrypted, but within this machine")
    return Finding(
        "Redis link",
        Severity.BAD,
        f"not encrypted, to {host}: money and keys cross the network in the clear",
        "AZU_REDIS_TLS=1 (and AZU_REDIS_CA for an authority of your own)",
    )


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _redis_version(found: str) -> Finding:
    good = tuple(map(int, found.split(".")[:2])) >= _OLDEST
    return Finding("Redis", Severity.OK if good else Severity.BAD, found, "" if good else "use 6.2 or later")


def _append_only_file(persistence: dict[str, object]) -> Finding:
    if not persistence["aof_enabled"]:
        return Finding("append-only file", Severity.BAD, "off", "CONFIG SET appendonly yes")
    failed = [
        name
        for name in ("aof_last_write_status", "aof_last_bgrewrite_status")
        if persistence.get(name, "ok") != "ok"
    ]
    advice = "look at the disk of Redis: it could not write" if failed else ""
    told = ", ".join(failed) + " failed" if failed else "on, its last write went well"
    return Finding("append-only file", Severity.BAD if failed else Severity.OK, told, advice)


def _configuration(client: "Redis") -> Iterator[Finding]:
    from redis.exceptions import RedisError

    try:
        # One name at a time: Redis 6 takes no more.
        found = {name: client.config_get(name).get(name) for name in DURABLE_CONFIG}
    except RedisError as error:
        yield Finding("durability", Severity.UNKNOWN, f"this user may not look: {error}", "ask Redis's owner")
        return
    # The file's name is its owner's business; the others are what the ledger counts on.
    others = {
        name: value
        for name, value in DURABLE_CONFIG.items()
        if name != "appendfilename" and found[name] not in (value, None)
    }
    advice = "; ".join(f'CONFIG SET {name} "{value}"' for name, value in others.items())
    told = ", ".join(f"{name} is {found[name]!r}" for name in others) or "what is acknowledged is on disk"
    yield Finding("durability", Severity.BAD if others else Severity.OK, told, advice)


def _file(settings: Settings) -> Iterator[Finding]:
    """Look at whether the books of a network that stands still end with a whole transfer."""
    from mmap import ACCESS_READ, mmap

    from azu.errors import LedgerError
    from azu.money.ledger.durability import read

    path = settings.home / "redis" / APPEND_ONLY_FILE
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        try:
            whole = read(content).whole_bytes == len(content)
        except LedgerError as error:
            yield Finding("append-only file", Severity.BAD, error.message, "restore it from a copy")
            return
    told = "whole to its last byte" if whole else "its tail is torn, as by a crash of the machine"
    yield Finding(
        "append-only file", Severity.OK if whole else Severity.BAD, told, "" if whole else "azu ledger repair"
    )


_LEAST_DISK_BYTES = 10 * GIB
_LEAST_SHARED_BYTES = 256 * MIB
_LEAST_OPEN_FILES = 4096
_SECRET_NAMES = ("*.key", "*.json", "ray-token", "redis/redis.conf", "tls/*.key", "networks/*/*.key")
_CPU_BUILD = re.compile(r"\+cpu$")


def python(_: Settings) -> Iterator[Finding]:
    """Look at the interpreter."""
    here, wanted = ".".join(map(str, sys.version_info[:3])), metadata("azu")["Requires-Python"]
    good = here in SpecifierSet(wanted)
    yield Finding("Python", _state(good), here, "" if good else f"use a Python {wanted}")


def packages(_: Settings) -> Iterator[Finding]:
    """Look at what a machine that serves or lends needs, and at which of it is there."""
    missing, other = [], []
    for line in requires("azu") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": "node"}):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            missing.append(wanted.name)
            continue
        if not wanted.specifier.contains(found.partition("+")[0], prereleases=True):
            other.append(f"{wanted.name} {found}, not {wanted.specifier}")
    advice = "pip install 'azu[node]'" if missing or other else ""
    told = "; ".join((*(f"{name} is missing" for name in missing), *other)) or "all there, in their ranges"
    yield Finding("packages", _state(not advice), told, advice)


def gpu(_: Settings) -> Iterator[Finding]:
    """Look at the GPUs, their driver, and whether torch was built for them."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        has_card = any(Path("/proc/driver").glob("nvidia*")) or shutil.which("nvidia-smi") is not None
        advice = "install the NVIDIA driver, or restart after its update" if has_card else ""
        state = Severity.BAD if has_card else Severity.OK
        yield Finding("GPU", state, f"none ({error}); the CPU can be lent", advice)
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
    if _CPU_BUILD.search(version("torch")):
        yield Finding(
            "torch", Severity.BAD, f"{version('torch')} cannot use the GPU", "install torch's CUDA build"
        )


def disk(settings: Settings) -> Iterator[Finding]:
    """Look at the room for shards, and for what Ray's processes share."""
    home = next(folder for folder in (settings.home, *settings.home.parents) if folder.exists())
    free = shutil.disk_usage(home).free
    enough = free >= _LEAST_DISK_BYTES
    yield Finding(
        "disk",
        Severity.OK if enough else Severity.WARNING,
        f"{format_bytes(free)} free at {home}",
        "" if enough else "shards are kept there: make room, or set AZU_HOME to a larger disk",
    )
    shared = shutil.disk_usage("/dev/shm").free  # noqa: S108 - Ray's own place
    enough = shared >= _LEAST_SHARED_BYTES
    yield Finding(
        "shared memory",
        Severity.OK if enough else Severity.WARNING,
        f"{format_bytes(shared)} free at /dev/shm",
        "" if enough else "make /dev/shm larger (docker run --shm-size=1g): Ray is slow without",
    )


def limits(_: Settings) -> Iterator[Finding]:
    """Look at how many files a process may open: every connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= _LEAST_OPEN_FILES
    advice = "" if enough else f"ulimit -n {min(hard, 65_536)}"
    yield Finding("open files", Severity.OK if enough else Severity.WARNING, f"at most {soft}", advice)


def ports(settings: Settings) -> Iterator[Finding]:
    """Look at whether the ingress's port is free, or azu's own."""
    about = f"port {settings.http_port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.http_host, settings.http_port))
        except OSError as error:
            if (settings.home / "admin.json").exists():
                yield Finding(about, Severity.OK, "taken by the network that runs here")
            else:
                advice = "stop who listens there, or set AZU_HTTP_PORT (or AZU_HTTP_HOST)"
                yield Finding(about, Severity.WARNING, f"{settings.http_host}: {error.strerror}", advice)
            return
    yield Finding(about, Severity.OK, f"free at {settings.http_host}")


def memory(_: Settings) -> Iterator[Finding]:
    """Look at the host's memory: stages keep what they sent there."""
    found = psutil.virtual_memory()
    enough = found.available >= 2 * GIB
    advice = "" if enough else "stop other programs: a stage keeps up to 1 GiB of what it sent"
    told = f"{format_bytes(found.available)} of {format_bytes(found.total)} available"
    yield Finding("memory", Severity.OK if enough else Severity.WARNING, told, advice)


def secrets(settings: Settings) -> Iterator[Finding]:
    """Look at who else may read the files with keys and passwords."""
    files = sorted({path for name in _SECRET_NAMES for path in settings.home.glob(name)})
    if named := os.environ.get("AZU_PRIVATE_KEY_FILE"):
        files.append(Path(named))
    open_to_others = [path for path in files if path.exists() and path.stat().st_mode & 0o077]
    for path in open_to_others:
        yield Finding("key file", Severity.BAD, f"others can read {path}", f"chmod 600 {path}")
    if not open_to_others:
        yield Finding("key files", Severity.OK, f"{len(files)} in {settings.home}, read by their owner alone")


LOOKS = {
    "Python": python,
    "packages": packages,
    "GPU": gpu,
    "memory": memory,
    "disk": disk,
    "open files": limits,
    "port": ports,
    "key files": secrets,
}


def _state(good: bool) -> Severity:
    return Severity.OK if good else Severity.BAD


_TIMEOUT_S = 5.0
_MOST_SKEW_S = 5.0
_SOON = timedelta(days=14)


class NetworkProbe:
    """A network as this machine reaches it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url, self._admin_key, self._trust = _found(settings)

    @property
    def is_meant(self) -> bool:
        """Whether somebody said where it is, or it runs here."""
        return self._admin_key is not None or "url" in self.settings.model_fields_set

    @property
    def is_local(self) -> bool:
        """Whether nothing of it leaves this machine on its way here."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def get(self, path: str) -> httpx.Response:
        """Return the ingress's answer; raises httpx's errors."""
        with httpx.Client(base_url=self.url, timeout=_TIMEOUT_S, verify=self._trust or True) as http:
            return http.get(path)

    def client(self) -> Client:
        """Return a client with whatever key is at hand; raises Unauthenticated when there is none."""
        from azu.cli.credentials import load_credential

        if self.settings.api_key is not None:
            key = self.settings.api_key.get_secret_value()
        else:
            key = load_credential(self.settings.home, self.settings.url).api_key
        return Client(self.url, key, tls=self._trust, timeout_s=_TIMEOUT_S)

    def certificate_ends(self) -> datetime:
        """Return when the ingress's certificate ends; it is not judged here."""
        from azu.auth.certificates import read_certificate

        parts = urlsplit(self.url)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        address = (parts.hostname or "", parts.port or 443)
        with (
            socket.create_connection(address, _TIMEOUT_S) as connection,
            context.wrap_socket(connection, server_hostname=parts.hostname) as channel,
        ):
            der = channel.getpeercert(binary_form=True)
        assert der is not None, "a TLS server has a certificate"
        return read_certificate(ssl.DER_cert_to_PEM_cert(der).encode()).not_valid_after_utc


def diagnose(settings: Settings) -> Iterator[Finding]:
    """Look at the network, as far as one is reached."""
    network = NetworkProbe(settings)
    try:
        started = time.time()
        health = network.get("/health")
    except httpx.TransportError as error:
        # A machine that never heard of a network is none the worse for it.
        state = Severity.BAD if network.is_meant else Severity.WARNING
        yield Finding("ingress", state, f"{network.url}: {error}", _advice(error))
        yield from _own_certificates(settings)
        return
    serves = health.status_code == 200
    yield Finding(
        "ingress",
        Severity.OK if serves else Severity.WARNING,
        f"{network.url} {'serves' if serves else 'is still starting, or has no control plane'}",
        "" if serves else "wait, then look into logs/ under the head's AZU_HOME",
    )
    yield from _clock(health, started, time.time())
    yield from _network_version(network)
    yield from _encryption(network)
    yield from _nodes(network)
    yield from _own_certificates(settings)


def _found(settings: Settings) -> tuple[str, str | None, ssl.SSLContext | None]:
    try:
        facts = admin_facts(settings.home)
    except NotFound:
        return settings.url, None, None if settings.tls_ca is None else trusting(settings.tls_ca)
    trust = None if facts.certificate is None else trusting_this(facts.certificate)
    return facts.url, facts.admin_key, trust


def _advice(error: httpx.TransportError) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "AZU_TLS_CA=FILE with the network's authority.crt, which its admin has"
    return "`azu up` starts a network here; AZU_URL says where another one is"


def _clock(reply: httpx.Response, sent_s: float, heard_s: float) -> Iterator[Finding]:
    if "date" not in reply.headers:
        return
    # The header has whole seconds.
    theirs = parsedate_to_datetime(reply.headers["date"]).timestamp()
    skew = max(sent_s - theirs - 1.0, theirs - heard_s, 0.0)
    good = skew <= _MOST_SKEW_S
    yield Finding(
        "clock",
        Severity.OK if good else Severity.BAD,
        "agrees with the network's" if good else f"{skew:.0f} s from the network's",
        "" if good else "set both by NTP: signatures and certificates are good for a time",
    )


def _network_version(network: NetworkProbe) -> Iterator[Finding]:
    from importlib.metadata import version

    reply = network.get("/v1/platform")
    theirs, ours = reply.json().get("version"), version("azu")
    good = theirs == ours
    told = f"{ours} here, {theirs or 'unknown'} there"
    yield Finding(
        "azu's version",
        Severity.OK if good else Severity.WARNING,
        ours if good else told,
        "" if good else "install the same version on both",
    )


def _encryption(network: NetworkProbe) -> Iterator[Finding]:
    """Say of everything that crosses between machines whether it is encrypted."""
    if network.url.startswith("https://"):
        yield _ending("ingress link", "encrypted", network.certificate_ends(), "a new certificate is due")
    elif network.is_local:
        yield Finding("ingress link", Severity.OK, "not encrypted, but within this machine")
    else:
        advice = "`azu up --tls --ip ADDRESS`, or AZU_TLS_CERT and AZU_TLS_KEY"
        yield Finding("ingress link", Severity.BAD, "not encrypted: keys and prompts can be read", advice)
    if network.get("/v1/nodes/authority").status_code == 200:
        yield Finding("between nodes", Severity.OK, "encrypted, both ends show a certificate")
    elif network.is_local:
        told = "not encrypted: for one machine only"
        yield Finding("between nodes", Severity.OK, told, "with others: `azu up --ip ADDRESS`")
    else:
        told = "not encrypted: hidden states and the cluster's token can be read"
        yield Finding("between nodes", Severity.BAD, told, "`azu up --ip ADDRESS` without --no-tls")
    chain = network.get("/v1/platform").json().get("chain_url", "")
    host = urlsplit(chain).hostname or ""
    safe = chain.startswith("https://") or host in ("127.0.0.1", "localhost")
    yield Finding(
        "chain link",
        Severity.OK if safe else Severity.WARNING,
        f"{'encrypted' if chain.startswith('https://') else 'not encrypted'}, to {host}",
        "" if safe else "HYPERLIQUID_RPC_URL=https://...",
    )
    yield Finding(
        "Ray's dashboard",
        Severity.OK,
        "never encrypted: it listens on the head's loopback only, where `azu up --dashboard` starts it",
        "from elsewhere: ssh -L 8265:127.0.0.1:8265",
    )


def _nodes(network: NetworkProbe) -> Iterator[Finding]:
    from azu.errors import AzuError, Unauthenticated

    try:
        nodes = network.client().network().nodes
    except Unauthenticated:
        yield Finding("nodes", Severity.UNKNOWN, "no key to ask with", "azu login")
        return
    except AzuError as error:
        yield Finding("nodes", Severity.WARNING, error.message, "look into logs/ under the head's AZU_HOME")
        return
    if not nodes:
        yield Finding("nodes", Severity.WARNING, "none: no model can run", "`azu join TICKET`, or --workers")
    for node in nodes:
        alive = node.state == "alive"
        yield Finding(
            f"node {node.name}",
            Severity.OK if alive else Severity.WARNING,
            f"{node.state}, {node.device}",
            "" if alive else "look at its machine: `azu join` there says what it waits for",
        )


def _own_certificates(settings: Settings) -> Iterator[Finding]:
    """Look at how long the certificates of this machine are good."""
    from azu.auth.certificates import read_certificate

    head = (settings.home / "tls", "head's certificate", "start the network again: that makes a new one")
    others = [
        (folder, "node's certificate", "`azu join` renews it by itself while it runs")
        for folder in sorted(settings.home.glob("networks/*"))
    ]
    for folder, about, advice in (head, *others):
        path: Path = TlsFiles.of(folder).certificate
        if path.exists():
            ends = read_certificate(path.read_bytes()).not_valid_after_utc
            yield _ending(about, f"of {path.parent}", ends, advice)


def _ending(about: str, told: str, ends: datetime, advice: str) -> Finding:
    now = datetime.now(UTC)
    state = Severity.BAD if ends <= now else Severity.WARNING if ends - now < _SOON else Severity.OK
    said = f"{told}, until {ends:%Y-%m-%d}"
    return Finding(about, state, said, "" if state is Severity.OK else advice)
