"""The reverse proxy before the ingress: what it passes on, what it bounds, and what it says."""

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from azu.config import ControlConfig
from azu.config.control import TlsConfig
from azu.launch import reverse_proxy
from azu.launch.membership import head_files
from azu.launch.processes import ProcessGroup, free_port
from azu.launch.reverse_proxy import (
    REVERSE_PROXY,
    haproxy_configuration,
    haproxy_executable,
    listens,
    write_certificate,
)
from deployments import middleware
from deployments.middleware import BodyLimit, ClientAddresses
from tests.deployments.local import config_of, policy_with

TRUSTED = "127.0.0.9"
MOST = 20
ANSWERS = 3


class Ingress:
    """An app in the place of Serve's proxy. A request for an answer takes until `end` is set."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.left = threading.Event()
        self.end = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(scope["path"])
        if scope["path"] == "/full/completions":
            await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body", "body": b"as Serve's own proxy"})
            return
        body = (await receive()).get("body", b"")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"].endswith("/completions"):
            await send({"type": "http.response.body", "body": b": \n\n", "more_body": True})
            leaving = asyncio.ensure_future(receive())
            while not (self.end.is_set() or leaving.done()):
                await asyncio.sleep(0.01)
            if leaving.done():
                self.left.set()
        said = {"client": scope["client"][0], "body": len(body)}
        await send({"type": "http.response.body", "body": json.dumps(said).encode()})


class Running:
    """The proxy and the app behind it."""

    def __init__(self, ingress: Ingress, port: int) -> None:
        self.ingress = ingress
        self.port = port

    def client(self, source: str = "127.0.0.1") -> httpx.Client:
        transport = httpx.HTTPTransport(local_address=source)
        return httpx.Client(transport=transport, base_url=f"http://127.0.0.1:{self.port}", timeout=20)

    def connected(self, sent: bytes, source: str = "127.0.0.1") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), 20, (source, 0))
        connection.sendall(sent)
        return connection


@contextmanager
def started(
    config: ControlConfig, folder: Path, wrapped: Callable[[ASGIApp], ASGIApp] = lambda app: app
) -> Iterator[Running]:
    """Run the proxy before an app, both at free ports."""
    executable = haproxy_executable()
    assert executable is not None
    config = replace(config, http_port=free_port(), serve_port=free_port())
    ingress, file = Ingress(), folder / "haproxy.cfg"
    file.write_text(haproxy_configuration(config, write_certificate(config, folder)))
    app = ClientAddresses(wrapped(ingress), trusted=config.trusted_proxies, behind=True)
    with served(app, config.serve_port), ProcessGroup(folder) as group:
        group.start(reverse_proxy.reverse_proxy(executable, file))
        group.wait_until(REVERSE_PROXY, lambda: listens(group.pid(REVERSE_PROXY), config.http_port), 20)
        yield Running(ingress, config.http_port)
        ingress.end.set()


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    for name in ("_HEADERS_S", "_BODY_S", "_QUEUE_S"):
        monkeypatch.setattr(reverse_proxy, name, 1)
    monkeypatch.setitem(reverse_proxy._PLACES, "answers", ANSWERS)
    config = config_of("", "", tmp_path, policy_with(connections_per_address=MOST), ())
    with started(replace(config, trusted_proxies=(ip_network(TRUSTED),)), tmp_path) as running:
        yield running


@contextmanager
def served(app: ClientAddresses, port: int | None) -> Iterator[None]:
    assert port is not None
    server = uvicorn.Server(uvicorn.Config(app, port=port, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield
    server.should_exit = True
    thread.join(20)


def test_a_request_that_does_not_end_is_refused_and_never_reaches_the_ingress(running: Running) -> None:
    posted = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{"
    halves = [running.connected(sent) for sent in (b"GET /health HTTP/1.1\r\nhost: a\r\n", posted)]
    answers = [half.recv(9999) for half in halves]
    assert [answer.split()[1] for answer in answers] == [b"408", b"408"]
    assert json.loads(answers[1].partition(b"\r\n\r\n")[2])["error"]["code"] == "slow_request"
    assert running.ingress.asked == []


def test_only_requests_with_prompts_may_have_a_body_that_is_passed_on_before_it_is_whole(
    running: Running,
) -> None:
    def said(head: str, rest: str = "content-length: 40000") -> bytes:
        sent = f"{head} HTTP/1.1\r\nhost: a\r\n{rest}\r\n\r\n7000\r\n{'x' * 30_000}"
        with running.connected(sent.encode()) as one:
            return one.recv(9999).split()[1]

    paths = ("/health", "/v1/balance", "/deposit", "/v1/models/a", "/x", "/docs")
    chunked = "transfer-encoding: chunked"
    refused = [said(f"POST {path}") for path in paths] + [said("GET /health"), said("POST /x", chunked)]
    assert refused == [b"413"] * 8
    no_posts = [f"{method} /v1/completions" for method in ("GET", "HEAD", "OPTIONS", "DELETE")]
    assert [said(head, rest) for head in no_posts for rest in (chunked, "content-length: 40000")] == [
        b"413"
    ] * 8
    long = f"content-length: 5000\r\nlong: {'l' * 14_000}"
    assert said("POST /submit", long) == b"413", "the ingress would take such a body for whole"
    assert said("POST /v1/completions%") == b"400"
    assert running.ingress.asked == []
    large = ["/submit", "/v1/quote", "/v1/completions", "/v1/chat/completions"]
    assert [said(f"POST {path}") for path in large] == [b"200", b"200", b"200", b"200"]
    assert running.ingress.asked == large


def test_a_body_that_goes_on_after_its_answer_holds_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pool in ("answers", "large"):
        monkeypatch.setitem(reverse_proxy._PLACES, pool, 1)
    config = config_of("", "", tmp_path, policy_with(), ())

    def unread(app: ASGIApp) -> ASGIApp:
        limited = BodyLimit(app, 50_000)

        async def chosen(scope: Scope, receive: Receive, send: Send) -> None:
            await (app if scope["path"].startswith("/full") else limited)(scope, receive, send)

        return chosen

    with started(config, tmp_path, unread) as running, ExitStack() as stack:
        running.ingress.end.set()
        asked = [("/v1/completions", 40_000, 400), ("/v1/completions", 60_000, 413), ("/submit", 40_000, 400)]
        for path, length, status in (*asked, ("/full/completions", 40_000, 503)):
            monkeypatch.setattr(middleware, "_BODY_S", 0.2)
            head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n"
            slow = stack.enter_context(running.connected(head.encode() + b"x" * 30_000))
            answer = slow.recv(9999)
            assert int(answer.split()[1]) == status
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
            with suppress(OSError):
                slow.sendall(b"x")
            # A good body may take its time on a busy machine.
            monkeypatch.setattr(middleware, "_BODY_S", 60.0)
            with running.client() as client:
                path = "/submit" if path == "/submit" else "/v1/completions"
                assert client.post(path, content=b"x" * 40_000).status_code == 200


def test_a_path_is_read_as_the_ingress_reads_it(running: Running) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(running.client())
        for _ in range(ANSWERS):
            stack.enter_context(client.stream("POST", "/v1/completion%73", content=b"{}"))
        assert client.post("/v1/completions", content=b"{}").status_code == 503
        running.ingress.end.set()


def test_only_a_trusted_proxy_says_from_where_a_request_comes(running: Running) -> None:
    said = {"x-forwarded-for": "6.6.6.6, 7.7.7.7", "x-azu-peer": "5.5.5.5", "x-forwarded-proto": "https"}
    found = []
    for source in ("127.0.0.2", TRUSTED):
        with running.client(source) as client:
            found.append(client.post("/x", headers=said, content=b"body").json())
    assert found == [{"client": "127.0.0.2", "body": 4}, {"client": "7.7.7.7", "body": 4}]


def test_an_address_has_only_so_many_connections(running: Running) -> None:
    with ExitStack() as stack:
        for _ in range(MOST):
            stack.enter_context(running.connected(b"GET"))
        with running.client() as client, pytest.raises(httpx.TransportError):
            client.get("/health")
        for other in ("127.0.0.2", TRUSTED):
            with running.client(other) as client:
                assert client.get("/health").status_code == 200


def test_answers_take_no_place_of_the_health_and_of_short_requests(running: Running) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(running.client())
        for _ in range(ANSWERS):
            stack.enter_context(client.stream("POST", "/v1/completions", content=b"{}"))
        refused = client.post("/v1/chat/completions", content=b"{}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "2"
        assert [client.get(path).status_code for path in ("/health", "/v1/balance", "/docs")] == [200] * 3
        running.ingress.end.set()


def test_the_ingress_hears_of_a_client_that_hangs_up(running: Running) -> None:
    with running.client() as client, client.stream("POST", "/v1/completions", content=b"{}"):
        assert not running.ingress.left.is_set()
    assert running.ingress.left.wait(20)


def test_it_decrypts_with_the_ingresss_own_certificate(tmp_path: Path) -> None:
    files = head_files(tmp_path / "head", ["127.0.0.1"]).ingress
    config = config_of("", "", tmp_path, policy_with(), ())
    tls = TlsConfig(files.certificate, files.key)
    with started(replace(config, tls=tls), tmp_path) as running:
        trusting = ssl.create_default_context(cafile=str(files.authority))
        trusting.set_alpn_protocols(["h2", "http/1.1"])
        with httpx.Client(base_url=f"https://127.0.0.1:{running.port}", verify=trusting) as client:
            answer = client.post("/x", content=b"body")
            assert answer.json() == {"client": "127.0.0.1", "body": 4}
            assert answer.http_version == "HTTP/1.1", "the requests of one connection of HTTP/2 do not count"
