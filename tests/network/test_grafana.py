"""Every panel of the Grafana dashboard has data, from Ray's agents and from the ingress."""

import json
import math
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import httpx
import pytest

from azu.launch.processes import free_port
from azu.units import hype_from_lamports
from tests.dashboard import DRAWN, SOURCES, expressions, panels
from tests.network.conftest import paying_user
from tests.network.prometheus import Prometheus, prometheus
from tests.network.user import User
from tests.prove.parts import azu

pytestmark = pytest.mark.prove

_DATA_TIMEOUT_S = 150.0


@dataclass(frozen=True, slots=True)
class Watched:
    """A network with Ray's dashboard, as `azu up` prints it, and the folder of Ray's agents."""

    url: str
    chain_url: str
    platform_address: str
    admin_key: str
    ray_folder: Path

    def fund(self, address: str, lamports: int) -> None:
        """Give an address play money."""
        body = {"address": address, "amount": hype_from_lamports(lamports)}
        httpx.post(f"{self.chain_url}/devnet/fund", json=body, timeout=30).raise_for_status()


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    """The demo's network, started by `azu up --dashboard` beside this process's own cluster."""
    with tempfile.TemporaryDirectory(prefix="azu-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = os.environ | {"AZU_HOME": folder, "AZU_HTTP_PORT": str(free_port())}
        command = azu("up", "--network", str(files("configs") / "demo.yaml"), "--dashboard", "--json")
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                facts = json.loads(process.stdout.readline())
                names = ("url", "chain_url", "platform_address", "admin_key")
                yield Watched(*(facts[name] for name in names), Path(folder) / "ray")
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)


def keep_busy(user: User, stop: threading.Event) -> None:
    """Send requests to both models without pause."""
    while not stop.is_set():
        for model in ("azu/tiny-dense", "azu/tiny-moe"):
            body = {"model": model, "prompt": "Hello", "max_tokens": 60, "ignore_eos": True}
            user.http.post("/v1/completions", json=body)


@pytest.fixture(scope="module")
def scraped(watched: Watched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus over the network while it works."""
    user = paying_user(watched, "grafana")
    stop = threading.Event()
    asking = threading.Thread(target=keep_busy, args=(user, stop))
    with prometheus(
        tmp_path_factory.mktemp("prometheus"),
        discovery=[watched.ray_folder / "head" / "prom_metrics_service_discovery.json"],
        ingress=watched.url,
        admin_key=watched.admin_key,
    ) as running:
        asking.start()
        try:
            yield running
        finally:
            stop.set()
            asking.join()


def wait_for_data(scraped: Prometheus, wanted: dict[str, str]) -> dict[str, str]:
    """Wait until every expression has data; return those that never had any."""
    deadline = time.monotonic() + _DATA_TIMEOUT_S
    missing = dict(wanted)
    while missing and time.monotonic() < deadline:
        time.sleep(2)
        missing = {name: expr for name, expr in missing.items() if not has_data(scraped, expr)}
    return missing


def has_data(scraped: Prometheus, expression: str) -> bool:
    values = [float(series["value"][1]) for series in scraped.query(expression)]
    return bool(values) and not any(math.isnan(value) for value in values)


def test_no_panel_is_without_data(scraped: Prometheus) -> None:
    wanted = {
        f"{source}: {panel['title']}, {index}": expression
        for source in SOURCES
        for panel in panels()
        for index, expression in enumerate(expressions(panel, source))
    }

    missing = wait_for_data(scraped, wanted)

    assert missing == {}
    names = {series["metric"]["__name__"] for series in scraped.query('{__name__=~"(ray_)?azu_.+"}')}
    for source in ("", "ray_"):
        for metric in DRAWN:
            ending = "_bucket" if metric.buckets else ""
            assert f"{source}{metric.name}{ending}" in names
    # At least four Ray nodes and the ingress.
    assert scraped.healthy_targets() >= 5
    print(f"\n{len(panels())} panels, {len(wanted)} queries over {len(names)} series' names: all have data")


def test_ray_and_the_ingress_agree(scraped: Prometheus) -> None:
    """Both count the same tokens; one of them lags some seconds."""
    expression = "sum(increase({}_generated_tokens_total[1m]))"
    found = [float(scraped.query(expression.format(source))[0]["value"][1]) for source in SOURCES]

    assert min(found) > 0
    assert max(found) < 2 * min(found)
