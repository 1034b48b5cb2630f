"""Ray's head process dies and is started again with its tables in a Redis of its own, outside Kubernetes.

azu does not set this up: a network of `azu up` ends with its head. It is for heads that Ray itself starts.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from azu.launch.processes import free_port
from tests.redis_server import start_redis

pytestmark = pytest.mark.prove

_TIMEOUT_S = 60
# A driver of its own: this session's process may be connected to another cluster.
_DRIVER = """
import subprocess, sys, time
import psutil, ray

address, folder = sys.argv[1:]
ray.init(address, namespace="azu", log_to_driver=False)

@ray.remote(num_cpus=1, lifetime="detached")
class Counter:
    def __init__(self):
        self.count = 0

    def add(self):
        self.count += 1
        return self.count

counter = Counter.options(name="counter").remote()
assert ray.get(counter.add.remote(), timeout=60) == 1
servers = [one for one in psutil.process_iter() if one.name() == "gcs_server"]
(gcs,) = [one for one in servers if folder in " ".join(one.cmdline())]
command, environment = gcs.cmdline(), gcs.environ()
gcs.kill()
gcs.wait(10)
assert [ray.get(counter.add.remote(), timeout=10) for _ in range(3)] == [2, 3, 4]

started = time.monotonic()
with open(folder + "/gcs.log", "w") as log:
    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
while True:
    try:
        found = ray.get_actor("counter", namespace="azu")
        break
    except Exception:
        assert time.monotonic() < started + 60
        time.sleep(0.1)
again_s = time.monotonic() - started
assert ray.get(found.add.remote(), timeout=10) == 5
new = Counter.options(name="new").remote()
assert ray.get(new.add.remote(), timeout=60) == 1
assert sum(node["Alive"] for node in ray.nodes()) == 2
print(f"answered while the GCS was dead; found again {again_s:.1f} s after its restart, new actors come up")
"""


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a cluster's sockets; every process that was started there is killed."""
    folder = tmp_path_factory.mktemp("gcs")
    yield folder
    for process in psutil.process_iter(["cmdline"]):
        if str(folder) in " ".join(process.info["cmdline"] or ()):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_actors_go_on_while_the_gcs_is_dead_and_new_ones_come_after_it_was_started_again(
    folder: Path,
) -> None:
    tables, port = start_redis(folder), free_port()
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

    def run(command: list[str], **more: str) -> str:
        done = subprocess.run(
            command,
            env=environment | more,
            capture_output=True,
            text=True,
            timeout=2 * _TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(name: str, *options: str, **more: str) -> None:
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--temp-dir", str(folder / name)]
        run([*ray, *options], **more)

    try:
        head = ("--head", "--port", str(port), "--num-cpus", "0", "--include-dashboard", "false")
        start("h", *head, RAY_REDIS_ADDRESS=f"127.0.0.1:{tables.port}")
        start("w", "--address", f"127.0.0.1:{port}", "--num-cpus", "2")
        print(run([sys.executable, "-c", _DRIVER, f"127.0.0.1:{port}", str(folder)]))
    finally:
        tables.stop()
