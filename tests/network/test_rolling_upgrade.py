"""Three nodes of an older release are replaced by newer ones while a stream goes on."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from azu.client import Client
from azu.devnet.faucet import fund
from azu.files import CONFIGS
from azu.money.chain.wallet import transfer_hype
from azu.units import LAMPORTS_PER_HYPE
from tests.network.user import log_in

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

ROOT = Path(__file__).resolve().parents[2]
OWNER = "0x" + "b0" * 20
NAMES = ("ada", "ben", "cleo")
START_TIMEOUT_S = 200.0
# What the head and each kind of node understand: newest, oldest, release.
HEAD, OLD, NEW, ANCIENT = (2, 1, "0.2"), (1, 1, "0.1"), (3, 2, "0.3"), (0, 0, "0.0")


def release(folder: Path, versions: tuple[int, int, str], where: str = "") -> dict[str, str]:
    """Return the environment of a program of another release; `where` is in its command line."""
    patch = folder / f"{versions[2]}{where}"
    patch.mkdir(exist_ok=True)
    (patch / "sitecustomize.py").write_text(
        f"import sys\nif {where!r} in ' '.join(sys.orig_argv):\n"
        "    from azu.protocol import versions\n"
        f"    versions.NEWEST, versions.OLDEST, versions._RELEASE = {versions!r}\n"
    )
    return {"PYTHONPATH": os.pathsep.join(map(str, (patch, ROOT)))}


@contextmanager
def azu(home: Path, environment: dict[str, str], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command; it is interrupted when the context is left."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
    process = subprocess.Popen(
        (sys.executable, "-m", "azu.cli", *arguments),
        env=kept | {"AZU_HOME": str(home), "AZU_HTTP_PORT": "0", "HF_HUB_OFFLINE": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


class Reader(threading.Thread):
    """Reads one answer after the other until it is told to stop, and compares each with the first."""

    def __init__(self, client: Client) -> None:
        super().__init__(daemon=True)
        self._client = client
        self.expected = self._answer()
        self.stop = threading.Event()
        self.answers: list[bool] = []

    def run(self) -> None:
        while not self.stop.is_set():
            self.answers.append(self._answer() == self.expected)

    def _answer(self) -> str:
        return "".join(
            self._client.stream(
                "Tell me how azu works.", model="azu/tiny-dense", max_tokens=60, temperature=1.0, seed=3,
                ignore_eos=True,
            )
        )  # fmt: skip


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def paying_client(facts: dict[str, str]) -> Client:
    user = log_in(facts["url"], "user")
    fund(facts["chain_url"], user.address, 2 * LAMPORTS_PER_HYPE)
    deposited = transfer_hype(
        user.account, facts["platform_address"], LAMPORTS_PER_HYPE, chain_url=facts["chain_url"]
    )
    body = {"tx_sig": deposited, "user_address": user.address}
    user.http.post("/deposit", json=body).raise_for_status()
    return Client(facts["url"], user.api_key)


def test_nodes_are_upgraded_one_by_one_under_a_stream() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="azu-", dir="/tmp", ignore_cleanup_errors=True) as made,
        ExitStack() as stack,
    ):
        folder = Path(made)
        file = folder / "network.yaml"
        policy = yaml.safe_load((CONFIGS / "demo.yaml").read_text())["policy"]
        file.write_text(yaml.safe_dump({"policy": policy | {"requeue": {"budget_s": 600}}}))
        up = stack.enter_context(
            azu(folder / "head", release(folder, HEAD), "up", "--network", str(file), "--json")
        )
        assert up.stdout is not None
        facts = json.loads(up.stdout.readline())

        def join(name: str, environment: dict[str, str]) -> subprocess.Popen[str]:
            options = ("--vram", "16MiB", "--payout", OWNER, "--name", name, "--cpu")
            return stack.enter_context(azu(folder / name, environment, "join", facts["ticket"], *options))

        joined = {name: join(name, release(folder, OLD)) for name in NAMES}
        client = paying_client(facts)

        def alive() -> dict[str, str]:
            return {node.name: node.node_id for node in client.network().nodes if node.state == "alive"}

        eventually(lambda: alive().keys() == set(NAMES))
        before = alive()
        reader = Reader(client)
        reader.start()
        for name in NAMES:
            owner = {"AZU_URL": facts["url"], "AZU_API_KEY": facts["admin_key"]}
            with azu(folder / "head", release(folder, HEAD) | owner, "leave", name) as leaving:
                said, _ = leaving.communicate(timeout=START_TIMEOUT_S)
                assert leaving.returncode == 0, said
            joined[name].send_signal(signal.SIGINT)
            assert joined[name].wait(60) == 130
            join(name, release(folder, HEAD))
            eventually(lambda name=name: alive().get(name, before[name]) != before[name])
        join("dora", release(folder, NEW))
        eventually(lambda: "dora" in alive())
        reader.stop.set()
        reader.join()
        print(f"\n{len(reader.answers)} streams whole while {len(NAMES)} nodes were upgraded")
        assert reader.answers
        assert all(reader.answers)

        refused = join("eve", release(folder, ANCIENT))
        told, _ = refused.communicate(timeout=60)
        print(told.strip())
        assert refused.returncode == 1
        assert "azu 0.0 on this node is too old for the network: install azu 0.2 on the node" in told
        assert not (folder / "eve" / "logs").exists()  # before Ray started

        # It comes past the check of `azu join`: the head asks its agent.
        join("fay", release(folder, ANCIENT, where="default_worker"))

        def problems() -> list[str]:
            found: list[str] = httpx.get(f"{facts['url']}/health", timeout=30).json()["problems"]
            return found

        eventually(problems)
        print(problems())
        assert problems() == [
            "node fay: azu 0.0 on this node is too old for the network: install azu 0.2 on the node"
        ]
        assert "fay" not in {node.name for node in client.network().nodes}
