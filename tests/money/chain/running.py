"""A devnet in a thread of the test's process, reached over real HTTP."""

import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from azu.devnet.server import build_app
from azu.money.chain.networks import ChainNetwork, network_at
from azu.units import hype_from_lamports


@dataclass(frozen=True, slots=True)
class RunningDevnet:
    url: str
    http: httpx.Client

    @property
    def network(self) -> ChainNetwork:
        return network_at(self.url)

    def fund(self, address: str, lamports: int, *, token: str | None = None) -> None:
        body = {"address": address, "amount": hype_from_lamports(lamports)}
        self._post("/devnet/fund", body | ({"token": token} if token else {}))

    def contract(
        self, destination: str, lamports: int, *, sender: str, count: int = 1, token: str | None = None
    ) -> int:
        """Have a contract of HyperEVM send; return the chain's time of the rows."""
        body = {"sender": sender, "destination": destination, "amount": hype_from_lamports(lamports)}
        options = {"count": count} | ({"token": token} if token else {})
        time_ms: int = self._post("/devnet/contract", body | options)["time"]
        return time_ms

    def fault(self, kind: str, **options: Any) -> None:
        self._post("/devnet/faults", {"kind": kind, **options})

    def no_faults(self) -> None:
        self.http.delete("/devnet/faults").raise_for_status()

    def info(self, kind: str, user: str, **fields: Any) -> Any:
        return self._post("/info", {"type": kind, "user": user, **fields})

    def txs(self, user: str) -> list[dict[str, Any]]:
        txs: list[dict[str, Any]] = self._post("/explorer", {"type": "userDetails", "user": user})["txs"]
        return txs

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self.http.post(path, json=body).raise_for_status().json()


@contextmanager
def running_devnet(seed: int | None = None) -> Iterator[RunningDevnet]:
    server = uvicorn.Server(uvicorn.Config(build_app(seed=seed), log_level="critical"))
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            # The devnet may close a kept connection just before the next call.
            with httpx.Client(
                base_url=url, timeout=10, limits=httpx.Limits(max_keepalive_connections=0)
            ) as http:
                yield RunningDevnet(url, http)
        finally:
            server.should_exit = True
            thread.join(timeout=10)


def fresh_address() -> str:
    return f"0x{secrets.token_hex(20)}"
