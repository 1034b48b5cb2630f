"""A small HTTP server with given replies, which keeps the requests that it got."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from azu.auth.key_records import ApiKey, key_id_of, key_text

PLATFORM = "0x" + "9a" * 20


@dataclass(frozen=True, slots=True)
class Request:
    """A request of a client; the port that it came from is its connection."""

    method: str
    path: str
    authorization: str | None
    body: Any
    connection: int = 0


class Comment(str):
    """A comment between server-sent events."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply: a body as JSON, chunks as server-sent events and comments, or content as it is."""

    body: Any = None
    status: int = 200
    chunks: Iterable[Any] | None = None
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Ingress:
    """`replies` maps "METHOD path" to the reply, or to what makes it of a body; `requests` are what came."""

    url: str = ""
    replies: dict[str, Reply | Callable[[Any], Reply]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    closed_early: threading.Event = field(default_factory=threading.Event)


@contextmanager
def running_ingress() -> Iterator[Ingress]:
    """Run the server on a free port."""
    ingress = Ingress()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with suppress(ConnectionResetError):  # a client that leaves
                super().handle()

        def do_GET(self) -> None:
            self._answer("GET", None)

        def do_DELETE(self) -> None:
            self._answer("DELETE", None)

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            self._answer("POST", json.loads(content or b"null"))

        def _answer(self, method: str, body: Any) -> None:
            key, connection = self.headers["authorization"], self.client_address[1]
            ingress.requests.append(Request(method, self.path, key, body, connection))
            found = ingress.replies.get(
                f"{method} {self.path}", Reply({"error": {"message": "no route"}}, 404)
            )
            reply = found(body) if callable(found) else found
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if reply.chunks is not None:
                self._stream(reply.chunks)
                return
            content = json.dumps(reply.body).encode() if reply.content is None else reply.content
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _stream(self, chunks: Iterable[Any]) -> None:
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            try:
                for chunk in chunks:
                    content = chunk if isinstance(chunk, str) else json.dumps(chunk)
                    field = ":" if isinstance(chunk, Comment) else "data:"
                    self._write_part(f"{field} {content}\n\n".encode())
                self._write_part(b"")
            except (BrokenPipeError, ConnectionResetError):
                ingress.closed_early.set()
                self.close_connection = True

        def _write_part(self, part: bytes) -> None:
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")

        def log_message(self, *_: Any) -> None:
            """Write no log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    ingress.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield ingress
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def platform_of(ingress: Ingress, address: str = PLATFORM) -> None:
    """Have the ingress show a platform, without encryption."""
    ingress.replies["GET /v1/platform"] = Reply({"address": address, "chain_url": ""})


def signing_in(
    ingress: Ingress,
    domain: str | None = None,
    platform: str = PLATFORM,
    change: Callable[[ApiKey], ApiKey] = lambda key: key,
) -> None:
    """Have the ingress ask for a signature of the key that the client wants, or of a changed one."""
    platform_of(ingress)

    def challenge(asked: dict[str, Any]) -> Reply:
        key = ApiKey(
            key_id=key_id_of(asked["key_sha256"]),
            digest=asked["key_sha256"],
            address=asked["address"].lower(),
            label=asked["label"],
            created_at_ms=1_700_000_000_000,
            expires_at_ms=asked.get("expires_at_ms"),
            spend_limit_lamports=asked.get("spend_limit_lamports"),
        )
        here = domain or ingress.url.removeprefix("http://")
        text = key_text(change(key), platform, here, "0f")
        return Reply({"nonce": "0f", "message": text, "created_at_ms": key.created_at_ms})

    ingress.replies["POST /v1/auth/challenge"] = challenge
    ingress.replies["POST /v1/auth/keys"] = Reply({"key_id": "key-1", "address": "0x1"})
