"""The network at AZU_URL, or the one that runs here: whether it answers, and what of it is encrypted."""

import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from azu.cli.doctor.findings import Finding, State
from azu.cli.network.admin import admin_facts
from azu.cli.network.tls import TlsFiles
from azu.client import Client
from azu.client.tls import trusting, trusting_this
from azu.config import Settings
from azu.errors import NotFound

_TIMEOUT_S = 5.0
_MOST_SKEW_S = 5.0
_SOON = timedelta(days=14)


class Network:
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
    network = Network(settings)
    try:
        started = time.time()
        health = network.get("/health")
    except httpx.TransportError as error:
        # A machine that never heard of a network is none the worse for it.
        state = State.BAD if network.is_meant else State.WARNING
        yield Finding("ingress", state, f"{network.url}: {error}", _advice(error))
        yield from _own_certificates(settings)
        return
    serves = health.status_code == 200
    yield Finding(
        "ingress",
        State.OK if serves else State.WARNING,
        f"{network.url} {'serves' if serves else 'is still starting, or has no control plane'}",
        "" if serves else "wait, then look into logs/ under the head's AZU_HOME",
    )
    yield from _clock(health, started, time.time())
    yield from _version(network)
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
        State.OK if good else State.BAD,
        "agrees with the network's" if good else f"{skew:.0f} s from the network's",
        "" if good else "set both by NTP: signatures and certificates are good for a time",
    )


def _version(network: Network) -> Iterator[Finding]:
    from importlib.metadata import version

    reply = network.get("/v1/platform")
    theirs, ours = reply.json().get("version"), version("azu")
    good = theirs == ours
    told = f"{ours} here, {theirs or 'unknown'} there"
    yield Finding(
        "azu's version",
        State.OK if good else State.WARNING,
        ours if good else told,
        "" if good else "install the same version on both",
    )


def _encryption(network: Network) -> Iterator[Finding]:
    """Say of everything that crosses between machines whether it is encrypted."""
    if network.url.startswith("https://"):
        yield _ending("ingress link", "encrypted", network.certificate_ends(), "a new certificate is due")
    elif network.is_local:
        yield Finding("ingress link", State.OK, "not encrypted, but within this machine")
    else:
        advice = "`azu up --tls --ip ADDRESS`, or AZU_TLS_CERT and AZU_TLS_KEY"
        yield Finding("ingress link", State.BAD, "not encrypted: keys and prompts can be read", advice)
    if network.get("/v1/nodes/authority").status_code == 200:
        yield Finding("between nodes", State.OK, "encrypted, both ends show a certificate")
    elif network.is_local:
        told = "not encrypted: for one machine only"
        yield Finding("between nodes", State.OK, told, "with others: `azu up --ip ADDRESS`")
    else:
        told = "not encrypted: hidden states and the cluster's token can be read"
        yield Finding("between nodes", State.BAD, told, "`azu up --ip ADDRESS` without --no-tls")
    chain = network.get("/v1/platform").json().get("chain_url", "")
    host = urlsplit(chain).hostname or ""
    safe = chain.startswith("https://") or host in ("127.0.0.1", "localhost")
    yield Finding(
        "chain link",
        State.OK if safe else State.WARNING,
        f"{'encrypted' if chain.startswith('https://') else 'not encrypted'}, to {host}",
        "" if safe else "HYPERLIQUID_RPC_URL=https://...",
    )
    yield Finding(
        "Ray's dashboard",
        State.OK,
        "never encrypted: it listens on the head's loopback only, where `azu up --dashboard` starts it",
        "from elsewhere: ssh -L 8265:127.0.0.1:8265",
    )


def _nodes(network: Network) -> Iterator[Finding]:
    from azu.errors import AzuError, Unauthenticated

    try:
        nodes = network.client().network().nodes
    except Unauthenticated:
        yield Finding("nodes", State.UNKNOWN, "no key to ask with", "azu login")
        return
    except AzuError as error:
        yield Finding("nodes", State.WARNING, error.message, "look into logs/ under the head's AZU_HOME")
        return
    if not nodes:
        yield Finding("nodes", State.WARNING, "none: no model can run", "`azu join TICKET`, or --workers")
    for node in nodes:
        alive = node.state == "alive"
        yield Finding(
            f"node {node.name}",
            State.OK if alive else State.WARNING,
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
    state = State.BAD if ends <= now else State.WARNING if ends - now < _SOON else State.OK
    said = f"{told}, until {ends:%Y-%m-%d}"
    return Finding(about, state, said, "" if state is State.OK else advice)
