"""A small HTTP server with given replies, which keeps the requests that it got."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, slots=True)
class Request:
    """A request of a client."""

    method: str
    path: str
    authorization: str | None
    body: Any


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply: a body as JSON, chunks as server-sent events, or content as it is."""

    body: Any = None
    status: int = 200
    chunks: tuple[Any, ...] | None = None
    content: bytes | None = None


@dataclass(slots=True)
class Ingress:
    """`replies` maps "METHOD path" to the reply; `requests` are those that arrived."""

    url: str = ""
    replies: dict[str, Reply] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    closed_early: threading.Event = field(default_factory=threading.Event)


@contextmanager
def running_ingress() -> Iterator[Ingress]:
    """Run the server on a free port."""
    ingress = Ingress()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer("GET", None)

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            self._answer("POST", json.loads(content))

        def _answer(self, method: str, body: Any) -> None:
            ingress.requests.append(Request(method, self.path, self.headers["authorization"], body))
            reply = ingress.replies.get(
                f"{method} {self.path}", Reply({"error": {"message": "no route"}}, 404)
            )
            self.send_response(reply.status)
            if reply.chunks is not None:
                self._stream(reply.chunks)
                return
            content = json.dumps(reply.body).encode() if reply.content is None else reply.content
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _stream(self, chunks: tuple[Any, ...]) -> None:
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            self.close_connection = True
            try:
                for chunk in chunks:
                    content = chunk if isinstance(chunk, str) else json.dumps(chunk)
                    self.wfile.write(f"data: {content}\n\n".encode())
                    self.wfile.flush()
            except (BrokenPipeError, ConnectionResetError):
                ingress.closed_early.set()

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
