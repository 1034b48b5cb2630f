"""The front door: requests a second, and processor time for a streamed token, beside the ingress alone."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from azu.bench.model import ModelShape
from azu.bench.report import Measurement, Measurements, call_apart
from azu.launch.local_network import demo_network
from azu.units import LAMPORTS_PER_HYPE

if TYPE_CHECKING:
    from azu.launch.local_network import LocalNetwork

_TIMEOUT_S = 600.0
_CLIENTS = 8
_REQUESTS = 400
_STREAMS = 8
_TOKENS = 64
# What a request passes on its way: the reverse proxy, Serve's proxy, the ingress.
_ON_THE_WAY = ("haproxy", "ray::ProxyActor", "ray::ServeReplica")
_MODEL = "azu/tiny-dense"
_DIRECT = "the ingress directly"


def measure_edge(_shape: ModelShape) -> Measurements:
    """Return requests a second and milliseconds of processors for a token, through the reverse proxy."""
    found = call_apart(_TIMEOUT_S, _measured)
    (through_rate, through_ms), (direct_rate, direct_ms) = found
    return [
        Measurement(
            f"short requests of {_CLIENTS} clients", "1/s", through_rate, direct_rate, _DIRECT, at_least=0.8
        ),
        Measurement("processor time of a streamed token", "ms", through_ms, direct_ms, _DIRECT, at_most=1.25),
    ]


def _measured() -> list[tuple[float, float]]:
    """Return both figures through the reverse proxy, then of the ingress; each the best of two turns."""
    os.environ.pop("RAY_AUTH_TOKEN", None)  # of the other measurements' clusters
    with tempfile.TemporaryDirectory(prefix="azu-") as home, _paid_network(Path(home)) as (network, key):
        ways = (network.url, network.direct_url)
        turns = [[(_requests_per_s(way), _token_ms(way, key)) for way in ways] for _ in range(3)][1:]
    return [
        (max(rate for rate, _ in of_way), min(ms for _, ms in of_way)) for of_way in zip(*turns, strict=True)
    ]


@contextmanager
def _paid_network(home: Path) -> "Iterator[tuple[LocalNetwork, str]]":
    from eth_account import Account

    from azu.client import Client
    from azu.money.chain.wallet import transfer_hype

    with demo_network(home, lambda _: None) as network:
        client, account = Client(network.url), Account.create()
        network.fund(account.address, 2 * LAMPORTS_PER_HYPE)
        key = client.login(account)
        tx_hash = transfer_hype(
            account, network.platform_address, LAMPORTS_PER_HYPE, chain_url=network.chain_url
        )
        client.deposit(tx_hash, account.address)
        client.generate("Hello", model=_MODEL, max_tokens=1)
        yield network, key


def _requests_per_s(url: str) -> float:
    import httpx

    def ask(count: int) -> None:
        with httpx.Client(base_url=url) as client:
            for _ in range(count):
                client.get("/v1/platform").raise_for_status()

    began = time.monotonic()
    _in_threads(ask, _CLIENTS, _REQUESTS // _CLIENTS)
    return _REQUESTS / (time.monotonic() - began)


def _token_ms(url: str, key: str) -> float:
    from azu.client import Client

    def read(_: int) -> None:
        list(Client(url, key).stream("Hello", model=_MODEL, max_tokens=_TOKENS, ignore_eos=True))

    before = _processor_s()
    _in_threads(read, _STREAMS, 0)
    return (_processor_s() - before) / (_STREAMS * _TOKENS) * 1e3


def _in_threads(call: Callable[[int], None], threads: int, given: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(call, [given] * threads))


def _processor_s() -> float:
    """Return the processor time of what a request passes on this machine."""
    total = 0.0
    for one in psutil.process_iter(["name", "cmdline", "cpu_times"]):
        titles = (one.info["name"] or "", " ".join(one.info["cmdline"] or ()))
        if any(title.startswith(_ON_THE_WAY) for title in titles):
            total += one.info["cpu_times"].user + one.info["cpu_times"].system
    return total
