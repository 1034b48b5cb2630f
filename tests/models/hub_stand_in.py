"""A local server that answers like the Hugging Face Hub, for the requests that azu sends."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40
OLD_COMMIT = "2" * 40


@dataclass
class HubStandIn:
    """Repositories by id: revision -> folder. `requests` logs (method, path, Authorization).

    `damaged` has, by a file's name, what the next downloads of it bring instead.
    """

    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str | None = None
    broken: bool = False
    damaged: dict[str, list[bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def add(self, repo_id: str, folder: Path, *, old: Path | None = None) -> None:
        """Serve a folder as the newest commit of a repository, and `old` as an older commit."""
        self.repositories[repo_id] = {COMMIT: folder} | ({OLD_COMMIT: old} if old else {})

    def downloads(self) -> set[str]:
        """Return the names of the files that were downloaded."""
        return {
            path.rpartition("/")[2]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        }


@contextmanager
def running_hub() -> Iterator[HubStandIn]:
    """Run the server on a free port."""
    hub = HubStandIn()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers["Authorization"]))
        if self.hub.broken:
            self._send(500, b"out of order")
            return
        if self.hub.token is not None and self.headers["Authorization"] != f"Bearer {self.hub.token}":
            self._refuse(401, "RepoNotFound")
            return
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        commits = self.hub.repositories.get(repo_id)
        if commits is None:
            self._refuse(404, "RepoNotFound")
            return
        revision = rest[1] if len(rest) > 1 else "main"
        commit = COMMIT if revision == "main" else OLD_COMMIT if revision == "v1" else revision
        if commit not in commits:
            self._refuse(404, "RevisionNotFound")
        elif path.startswith("/api/"):
            self._api(repo_id, commit, commits[commit], rest[0] if rest else "revision")
        elif repo_id in self.hub.gated:
            self._refuse(403, "GatedRepo")
        else:
            self._file(commit, commits[commit] / "/".join(rest[2:]))

    def _api(self, repo_id: str, commit: str, folder: Path, kind: str) -> None:
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        if kind == "tree":
            self._json([_entry(path) for path in files])
        else:
            siblings = [_sibling(path) for path in files]
            self._json({"id": repo_id, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def _file(self, commit: str, path: Path) -> None:
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        if self.command == "GET" and (instead := self.hub.damaged.get(path.name)):
            content = instead.pop(0)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path.suffix == ".safetensors":
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(path.stat().st_size)}
        self._send(200, content, headers)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    entry = {
        "type": "file",
        "path": path.name,
        "size": len(content),
        "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
    }
    if path.suffix == ".safetensors":
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _sibling(path: Path) -> dict[str, object]:
    entry = _entry(path)
    sibling = {"rfilename": path.name, "size": entry["size"], "blobId": entry["oid"]}
    if isinstance(lfs := entry.get("lfs"), dict):
        sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
    return sibling
