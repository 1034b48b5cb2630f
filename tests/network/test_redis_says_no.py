"""Redis refuses, freezes, dies or forgets under 8 clients: every job is right or told, the books agree."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import redis

from azu.client import Client
from azu.errors import AzuError
from azu.launch.local_network import LocalNetwork
from azu.launch.redis_server import BOOKS_STORE, JOB_STORE
from azu.money.ledger.durability import DURABLE_CONFIG, append_only_files
from tests.network.conftest import ledger_redis_url, paying_user
from tests.network.load import MAX_TOKENS, Load, loaded, undisturbed
from tests.network.test_money import settled
from tests.network.test_soak import audit
from tests.network.user import User
from tests.redis_server import start_redis

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

CLIENTS = 8
FAULT_S = 5.0
# The issue of each fault is printed; these only say that nothing had to be restarted by hand.
TOLD_S, BACK_S = 5.0, 15.0


@dataclass
class Store:
    """One of the network's two Redis and what happens to it; a fault lasts as long as its block."""

    network: LocalNetwork
    home: Path
    name: str

    def admin(self) -> redis.Redis:
        is_books = self.name == BOOKS_STORE.name
        return redis.Redis.from_url(ledger_redis_url(self.network) if is_books else self.network.redis_url)

    @property
    def folder(self) -> Path:
        return self.home / self.name

    @property
    def process(self) -> psutil.Process:
        below = psutil.Process().children(recursive=True)
        (found,) = [one for one in below if one.name().startswith("valkey-server") and self._is_ours(one)]
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return any(self.folder in Path(file.path).parents for file in process.open_files())
        return False

    def position(self) -> int:
        return self.written_file.stat().st_size

    @property
    def written_file(self) -> Path:
        return append_only_files(self.folder)[-1]

    def kill(self) -> None:
        process = self.process
        process.send_signal(signal.SIGKILL)
        # Its parent, the process group, has to find it ended: nothing else may wait for it.
        with suppress(psutil.NoSuchProcess):
            while process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)

    @contextmanager
    def config(self, name: str, value: object, usual: object) -> Iterator[None]:
        with self.admin() as admin:
            admin.config_set(name, str(value))
            yield
            admin.config_set(name, str(usual))

    @contextmanager
    def is_a_replica(self) -> Iterator[None]:
        with self.admin() as admin:
            admin.replicaof("127.0.0.1", 1)
            yield
            admin.replicaof("NO", "ONE")

    @contextmanager
    def cannot_save(self) -> Iterator[None]:
        blocked = self.folder / "dump.rdb"
        (blocked / "in-the-way").mkdir(parents=True)
        with self.admin() as admin, self.config("save", "3600 1", ""):
            admin.bgsave()
            while admin.info("persistence")["rdb_last_bgsave_status"] == "ok":
                time.sleep(0.01)
            yield
        shutil.rmtree(blocked)

    @contextmanager
    def is_frozen(self) -> Iterator[None]:
        process = self.process
        process.suspend()
        yield
        process.resume()

    @contextmanager
    def loads_slowly(self) -> Iterator[None]:
        """Die, and take about as long as a fault lasts to read the file."""
        conf = self.folder / "redis.conf"
        usual = conf.read_text()
        commands = sum(one.read_bytes().count(b"\r\n*") for one in append_only_files(self.folder))
        conf.write_text(f"{usual}key-load-delay {max(1, round(FAULT_S * 1e6 / commands))}\n")
        self.kill()
        yield
        conf.write_text(usual)
        with self.admin() as admin:
            while not answers(admin):
                time.sleep(0.1)

    @contextmanager
    def lost_its_tail(self) -> Iterator[None]:
        """Die and come back without the last two seconds."""
        position = self.position()
        time.sleep(2.0)
        self.kill()
        os.truncate(self.written_file, position)
        yield

    @contextmanager
    def is_a_promoted_replica(self) -> Iterator[None]:
        """Die; a replica that lagged two seconds behind takes the place."""
        with self.admin() as admin:
            password = str(admin.config_get("requirepass")["requirepass"])
            port = admin.connection_pool.connection_kwargs["port"]
        other = start_redis(self.home / "replica", {**DURABLE_CONFIG, "masterauth": password})
        with redis.Redis(port=other.port) as replica:
            replica.replicaof("127.0.0.1", port)
            while (
                replica.info("replication")["master_link_status"] != "up"
                or replica.info("persistence")["aof_rewrite_in_progress"]
            ):
                time.sleep(0.05)
            replica.replicaof("NO", "ONE")
            time.sleep(2.0)
            self.kill()
            other.stop()
            kept = self.written_file.parent
            shutil.rmtree(kept)
            shutil.copytree(append_only_files(other.folder)[-1].parent, kept)
        yield


def answers(admin: redis.Redis) -> bool:
    try:
        return bool(admin.ping())
    except redis.RedisError:
        return False


@pytest.fixture(scope="module", params=[BOOKS_STORE.name, JOB_STORE.name])
def store(
    request: pytest.FixtureRequest, network: LocalNetwork, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Store]:
    """Each Redis of the network; what dies is restarted as `azu up` does."""
    over = threading.Event()

    def revive() -> None:
        while not over.wait(0.5):
            network.revive()

    reviving = threading.Thread(target=revive)
    reviving.start()
    yield Store(network, tmp_path_factory.getbasetemp() / "azu0", request.param)
    over.set()
    reviving.join(60)


FAULTS: dict[str, Callable[[Store], object]] = {
    "READONLY": lambda store: store.is_a_replica(),
    "NOREPLICAS": lambda store: store.config("min-replicas-to-write", 1, 0),
    "OOM": lambda store: store.config("maxmemory", 1, 0),
    "MISCONF": lambda store: store.cannot_save(),
    "LOADING": lambda store: store.loads_slowly(),
    "SIGSTOP": lambda store: store.is_frozen(),
    "cut tail": lambda store: store.lost_its_tail(),
    "promoted replica": lambda store: store.is_a_promoted_replica(),
}
LOSSES = ("cut tail", "promoted replica")


@pytest.mark.parametrize("fault", FAULTS)
def test_every_job_is_right_or_told_and_everything_runs_again_by_itself(store: Store, fault: str) -> None:
    user = paying_user(store.network, f"{store.name} {fault}")
    right = undisturbed(user)
    known = {str(job["job_id"]) for job in jobs_of(user)}

    with loaded(user, CLIENTS, right) as load:
        go_on_for(load, answers=CLIENTS)
        with FAULTS[fault](store):  # type: ignore[attr-defined]
            told_s = refused_after_s(user) if fault not in LOSSES else 0.0
            if fault not in LOSSES:
                time.sleep(max(0.0, FAULT_S - told_s))
        back_s = answered_after_s(user)
        go_on_for(load, answers=2 * CLIENTS)

    assert load.wrong == []
    broken = {text: times for text, times in load.refused.items() if text.startswith("after pieces")}
    assert fault in LOSSES or not broken, "a stream that began goes on"
    available, reserved = user.balance() if fault in LOSSES else settled(user)
    jobs = [job for job in jobs_of(user) if str(job["job_id"]) not in known]
    states = {state: sum(job["status"] == state for job in jobs) for state in ("done", "failed", "cancelled")}
    assert sum(states.values()) == len(jobs)
    assert fault in LOSSES or states["failed"] == 0
    texts = set(right.values())
    for job in jobs:
        found = user.results(str(job["job_id"])) if job["status"] == "done" else {"token_ids": ()}
        assert len(found["token_ids"]) < MAX_TOKENS or found["text"] in texts
    report = audit(store.network, store.home)
    assert report["in_flight_lamports"] == 0
    if fault in LOSSES and store.name == BOOKS_STORE.name:
        accept_loss(store, user)
    print(
        f"{store.name}, {fault}: {load.answers} answers, all right; a new request was refused after "
        f"{told_s:.2f} s, the "
        f"first was answered {back_s:.2f} s after the end; jobs {states}; refused: {dict(load.refused)}; "
        f"{available} lamports left, {reserved} reserved"
    )
    assert told_s < TOLD_S
    assert back_s < BACK_S


def jobs_of(user: User) -> list[dict[str, object]]:
    jobs: list[dict[str, object]] = user.http.get("/v1/jobs", params={"limit": 1000}).json()["data"]
    return jobs


def go_on_for(load: Load, *, answers: int) -> None:
    """Wait until that many more answers have arrived."""
    wanted, deadline = load.answers + answers, time.monotonic() + 120
    while load.answers < wanted:
        assert time.monotonic() < deadline, (load.answers, wanted, load.refused)
        time.sleep(0.1)


def refused_after_s(user: User) -> float:
    """Send one request; return after how long it got 503 with Retry-After."""
    began_s = time.monotonic()
    body = {"model": "azu/tiny-dense", "prompt": "Hello", "max_tokens": 1}
    reply = user.http.post("/v1/completions", json=body)
    assert reply.status_code == 503, reply.text
    assert int(reply.headers["retry-after"]) >= 1
    return time.monotonic() - began_s


def answered_after_s(user: User) -> float:
    """Send requests until one is answered; return how long that took."""
    client, began_s = Client(user.url, user.api_key), time.monotonic()
    while time.monotonic() < began_s + 90:
        with suppress(AzuError):
            if "".join(client.stream("Hello", model="azu/tiny-dense", max_tokens=2, ignore_eos=True)):
                return time.monotonic() - began_s
        time.sleep(0.1)
    raise AssertionError("nothing is answered any more")


def accept_loss(store: Store, user: User) -> None:
    """See the loss in /health, the receipt unsigned, and receipts signed again after the admin's word."""
    assert user.http.get("/health").json()["problems"]
    job_id = str(jobs_of(user)[0]["job_id"])
    assert user.http.get(f"/v1/receipts/{job_id}").raise_for_status().json()["signature"] is None
    command = [sys.executable, "-m", "azu.cli", "treasury", "accept-loss"]
    subprocess.run(command, env=os.environ | {"AZU_HOME": str(store.home)}, timeout=60, check=True)
    deadline = time.monotonic() + 60
    while user.http.get(f"/v1/receipts/{job_id}").raise_for_status().json()["signature"] is None:
        assert time.monotonic() < deadline
    # The signer waits for ten minutes, in which no other process may send; it says so at its next look.
    while not all(
        "nothing is signed before" in problem for problem in user.http.get("/health").json()["problems"]
    ):
        assert time.monotonic() < deadline, user.http.get("/health").json()["problems"]
        time.sleep(0.2)
