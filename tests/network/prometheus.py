"""Debian's Prometheus over a running network, queried as Grafana queries it."""

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from azu.launch.processes import free_port

_START_TIMEOUT_S = 30.0
SCRAPE_S = 2


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A server that scrapes a network."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the current series of an expression."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30)
        body: dict[str, Any] = answer.json()
        assert body["status"] == "success", f"{expression}: {body}"
        found: list[dict[str, Any]] = body["data"]["result"]
        return found

    def healthy_targets(self) -> int:
        """Return how many targets were scraped without an error."""
        targets = httpx.get(f"{self.url}/api/v1/targets", timeout=30).json()["data"]["activeTargets"]
        return sum(target["health"] == "up" for target in targets)


@contextmanager
def prometheus(
    folder: Path, *, discovery: Sequence[Path], ingress: str, admin_key: str
) -> Iterator[Prometheus]:
    """Scrape what Ray's service discovery files name, and the ingress; fails where it is not installed."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.fail("this test needs Debian's prometheus: apt-get install it")
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s"},
        "scrape_configs": [
            {"job_name": "ray", "file_sd_configs": [{"files": [str(path) for path in discovery]}]},
            {
                "job_name": "azu",
                "static_configs": [{"targets": [ingress.removeprefix("http://")]}],
                "authorization": {"credentials": admin_key},
            },
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]  # fmt: skip
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_until_ready(f"http://{address}", process)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(10)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            if httpx.get(f"{url}/-/ready", timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert process.poll() is None, "Prometheus ended"
        assert time.monotonic() < deadline, "Prometheus is not ready"
        time.sleep(0.2)
