"""The front door under clients that hold connections: the health is told, and paying clients are answered."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from azu.launch.local_network import LocalNetwork
from tests.network.conftest import paying_user
from tests.network.user import User, log_in

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

HALF_OPEN = int(os.environ.get("AZU_TEST_HALF_OPEN", "10000"))
SLOW = int(os.environ.get("AZU_TEST_SLOW", "1000"))
STREAMS = int(os.environ.get("AZU_TEST_STREAMS", "1100"))
STREAM_TOKENS = 16
# Fewer than the jobs that one key may have in flight, and than the requests that it may send at once.
STREAMS_OF_ONE = 184
PAID = 20
TRIES, RETRY_S = 5, 2.0
PROBE_S = 0.25
ATTACKERS = Path(__file__).with_name("attackers.py")


@dataclass
class Health:
    """The answers of /health, in seconds, and what else came."""

    seconds: list[float] = field(default_factory=list)
    unwell: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)

    def probe(self, url: str, stop: threading.Event) -> None:
        transport = httpx.HTTPTransport(local_address="127.3.0.1")
        with httpx.Client(base_url=url, transport=transport, timeout=20) as client:
            while not stop.wait(PROBE_S):
                began = time.monotonic()
                try:
                    answer = client.get("/health")
                except httpx.TransportError as error:
                    self.unanswered.append(repr(error))
                    continue
                self.seconds.append(time.monotonic() - began)
                if answer.status_code != 200:
                    self.unwell.append(answer.text)


@contextmanager
def health_watched(url: str) -> Iterator[Health]:
    health, stop = Health(), threading.Event()
    thread = threading.Thread(target=health.probe, args=(url, stop))
    thread.start()
    try:
        yield health
    finally:
        stop.set()
        thread.join()


@contextmanager
def attacked(url: str, key: str) -> Iterator[list[dict[str, int]]]:
    """Have connections held during the block; yields what the attackers report."""
    arguments = [str(urlsplit(url).port), str(HALF_OPEN), str(SLOW), key]
    process = subprocess.Popen(
        [sys.executable, "-S", str(ATTACKERS), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    reports: list[dict[str, int]] = []

    def read() -> None:
        assert process.stdout is not None
        reports.extend(map(json.loads, process.stdout))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        deadline = time.monotonic() + 60
        while not (reports and reports[-1]["held"] >= 0.9 * (HALF_OPEN + SLOW)):
            assert time.monotonic() < deadline, reports[-3:]
            time.sleep(0.2)
        yield reports
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)
        reader.join()


def paid_seconds(user: User) -> float:
    """Return how long a paid request takes; the middle of some."""
    found = []
    for _ in range(PAID):
        began = time.monotonic()
        body = {"model": "azu/tiny-dense", "prompt": "Hello", "max_tokens": 8, "ignore_eos": True}
        user.http.post("/v1/completions", json=body).raise_for_status()
        found.append(time.monotonic() - began)
    return median(found)


@dataclass
class Streams:
    """Honest streams that are all open at once, and how many came to their end."""

    url: str
    opened: int = 0
    most: int = 0
    whole: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    async def read(self, key: str, source: str) -> None:
        """Read a stream; one that is refused is asked for again later, as the clients of OpenAI do."""
        for _ in range(TRIES):
            answer = await self._answer(key, source)
            head, _, body = answer.partition(b"\r\n\r\n")
            if b" 200 " in head[:20] and b"data: [DONE]" in body:
                self.whole += 1
                return
            self.refused[(head[9:12] + body[-300:]).decode(errors="replace")] += 1
            await asyncio.sleep(RETRY_S)

    async def _answer(self, key: str, source: str) -> bytes:
        asked = {"model": "azu/tiny-dense", "prompt": "Hello", "max_tokens": STREAM_TOKENS}
        body = json.dumps({**asked, "ignore_eos": True, "stream": True})
        host = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(host.hostname, host.port, local_addr=(source, 0))
        writer.write(
            "POST /v1/completions HTTP/1.1\r\nhost: azu\r\nconnection: close\r\n"
            f"authorization: Bearer {key}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n{body}".encode()
        )
        self.opened += 1
        self.most = max(self.most, self.opened)
        try:
            return await asyncio.wait_for(reader.read(-1), 300)
        finally:
            self.opened -= 1
            writer.close()


async def all_streams(url: str, users: list[User]) -> Streams:
    streams = Streams(url)
    asked = [
        streams.read(users[index // STREAMS_OF_ONE].api_key, f"127.5.0.{1 + index % 8}")
        for index in range(STREAMS)
    ]
    await asyncio.gather(*asked)
    return streams


def serve_processes() -> set[int]:
    """Return the processes of Serve: its proxy and the ingress's replica."""
    titles = ("ray::ProxyActor", "ray::ServeReplica")
    return {
        one.pid
        for one in psutil.process_iter(["cmdline"])
        if " ".join(one.info["cmdline"] or ()).startswith(titles)
    }


def test_connections_that_are_held_keep_out_no_one_else(network: LocalNetwork) -> None:
    user, free = paying_user(network, "paying"), log_in(network.url, "free")
    users = [paying_user(network, f"reader {index}") for index in range(-(-STREAMS // STREAMS_OF_ONE))]
    before, alone_s = serve_processes(), paid_seconds(user)
    assert before
    with health_watched(network.url) as calm:
        time.sleep(5)
    with attacked(network.url, free.api_key) as reports:
        with health_watched(network.url) as health:
            attacked_s = paid_seconds(user)
            time.sleep(20)
        print(f"\n{reports[-1]}")
        with health_watched(network.url) as crowded:
            began = time.monotonic()
            streams = asyncio.run(all_streams(network.url, users))
            took_s = time.monotonic() - began
        print(reports[-1])
    for name, one in (("alone", calm), ("under attack", health), ("with streams too", crowded)):
        print(
            f"health {name}: middle {median(one.seconds):.2f} s, worst {max(one.seconds):.2f} s, {one.unwell}"
        )
    print(
        f"{streams.whole} streams whole in {took_s:.0f} s, {streams.most} at once; refused: {streams.refused}"
    )
    print(f"a paid request: {alone_s:.3f} s alone, {attacked_s:.3f} s under attack")
    assert (health.unanswered, crowded.unanswered) == ([], [])
    assert streams.whole == STREAMS
    assert attacked_s <= 2 * alone_s
    assert serve_processes() == before
