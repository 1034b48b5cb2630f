"""Ray nodes of this machine as child processes: the head, and one node for each GPU that is lent."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from azu.auth.certificates import new_node_id
from azu.cluster.lending import TERMS, LendingTerms
from azu.errors import ConfigurationError
from azu.launch import ray_start
from azu.launch.membership import LOOPBACK, TlsFiles
from azu.launch.processes import ProcessSpec, free_port
from azu.launch.unix_users import UnixUser
from azu.units import MIB, format_bytes

if TYPE_CHECKING:
    from azu.engine.device import DeviceSpeed

HEAD = "ray-head"
# A node prints it once it has joined its cluster.
STARTED = r"Ray runtime started\."
# What Ray prints when the head has another token, once a second until the node ends.
REFUSED = "InvalidAuthToken"
_OBJECT_STORE_BYTES = 256 * MIB
_GPU_QUERY_TIMEOUT_S = 20.0
# Any task can read the environment that its node was started with.
_SECRETS = frozenset(
    {
        "AZU_ADMIN_KEY", "AZU_API_KEY", "AZU_PRIVATE_KEY_FILE", "AZU_WALLET_PASSWORD", "REDIS_PASSWORD",
        "SCHEDULER_PRIVATE_KEY", "AZU_TICKET",
    }
)  # fmt: skip
_HEAD_ONLY = {
    # A killed node is noticed after 3 s and a silent one after 9 s, instead of 15 s and a minute.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    # Serve kills a proxy that is not ready within 5 s, and the network does not start: on a busy machine
    # its imports take longer.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "600",
    # Serve replaces its proxy, which every request passes, after three failed checks: 30 s after it died.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # What Ray's control service remembers, for its dashboard, of calls and of what has died. By default that
    # is 100,000 calls and more than a million that were dropped: hundreds of MiB after some hours.
    "RAY_task_events_max_num_task_in_gcs": "5000",
    "RAY_task_events_max_dropped_task_attempts_tracked_per_job_in_gcs": "1000",
    "RAY_maximum_gcs_destroyed_actor_cached_count": "1000",
    "RAY_maximum_gcs_dead_worker_cached_count": "1000",
}
_ALWAYS = {
    # A node ends at SIGTERM: azu moves the pieces, Ray has nothing to drain.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # A process that does not report within a minute is killed: on a busy machine its imports take longer.
    "RAY_worker_register_timeout_seconds": "600",
    # A node ends where its dashboard agent does not answer within 30 s.
    "RAY_agent_register_timeout_ms": "600000",
    # Ray runs actors at niceness 15: every other program of the machine would come before waiting users.
    "RAY_worker_niceness": "0",
    # Calls that a process has not reported yet to the control service.
    "RAY_task_events_max_num_status_events_buffer_on_worker": "1000",
    "RAY_task_events_max_num_profile_events_buffer_on_worker": "1000",
    # Each process's log is followed by at most two older files.
    "RAY_ROTATION_MAX_BYTES": str(16 * MIB),
    "RAY_ROTATION_BACKUP_COUNT": "2",
}
# glibc reads it before Python runs, so a node starts with it: stages read weights faster in large pages.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# Imported by every process of a lender's node before it has work.
_PRELOADED = "actors.preloaded"
# Ray reads a node's id from this variable, if it is set, and makes one else.
_NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"
# The longest path that a Unix socket may have, and what Ray appends to its folder to make one.
_MAX_SOCKET_PATH = 107
_SOCKET_SUFFIX = len("/head/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")


_NO_LIMITS = LendingTerms()


@dataclass(frozen=True, slots=True)
class Worker:
    """One node that lends VRAM, in whole MiB. `cuda_device` is the GPU that it sees, None for a CPU.

    `index` differs between the workers of one machine.
    """

    index: int
    name: str
    vram_bytes: int
    payout_address: str
    cuda_device: str | None = None
    terms: LendingTerms = _NO_LIMITS

    def speed(self, speeds: Path) -> "DeviceSpeed | None":
        """Return the speed of its device, measured now; earlier results are in a folder.

        None for a GPU that this process does not see. Raises DeadlineExceeded or InternalError for one that
        cannot be measured.
        """
        from azu.engine.device import device_speed

        if self.cuda_device is None:
            return device_speed("cpu", speeds)
        seen = cuda_devices()
        if self.cuda_device not in seen:
            return None
        return device_speed(f"cuda:{seen.index(self.cuda_device)}", speeds)

    def work_bytes_per_s(self, speeds: Path) -> int:
        """Return the most work that its device can do, 0 if `speed` returns none; raises as that."""
        measured = self.speed(speeds)
        return 0 if measured is None else measured.work_bytes_per_s


def check_lent(workers: Iterable[Worker], device_bytes: Callable[[str | None], int | None]) -> None:
    """Raise ConfigurationError where workers of this machine lend more of a device than it has.

    `device_bytes` returns the memory of a GPU, or for None of the machine, and None where that is not known.
    """
    lent = Counter[str | None]()
    for worker in workers:
        lent[worker.cuda_device] += worker.vram_bytes
    for device, size in lent.items():
        has = device_bytes(device)
        if has is not None and size > has:
            what = "this machine" if device is None else f"GPU {device}"
            raise ConfigurationError(
                f"{format_bytes(size)} are more than {what} has, which is {format_bytes(has)}: lend less",
                param="vram",
            )


@dataclass(frozen=True, slots=True)
class RayHost:
    """This machine as a host of Ray nodes.

    `folder` holds their sockets and logs, `token_path` the cluster's token. `ip` is the address at which
    other machines reach them; with that of the loopback they listen nowhere else. Without a dashboard they
    start much faster. With `tls` they accept only connections with a certificate of the network. `home` is
    AZU_HOME for them, None for that of this process.
    """

    folder: Path
    token_path: Path
    ip: str = LOOPBACK
    dashboard_port: int | None = None
    tls: TlsFiles | None = None
    home: Path | None = None

    def head(self, port: int) -> ProcessSpec:
        """Return how to start the head: Ray's control service and azu's control plane, without VRAM."""
        options = (
            *("--head", "--port", str(port), "--no-monitor"),
            *("--include-dashboard", str(self.dashboard_port is not None)),
            *("--dashboard-port", str(self.dashboard_port or free_port())),
        )
        environment = self._environment(frozenset()) | _HEAD_ONLY
        return ProcessSpec(HEAD, self._start("head", *options), environment)

    def worker(
        self,
        head: str,
        worker: Worker,
        enrol: Callable[[str], None] = lambda _: None,
        new_id: Callable[[], str] = new_node_id,
    ) -> ProcessSpec:
        """Return how to start a node that joins the head at "host:port" as soon as the head answers.

        Each time it starts it has a new id, with which `enrol` is called before: until then no other machine
        knows the id, so that none can be paid for the node's work.
        """

        def each_start() -> dict[str, str]:
            node_id = new_id()
            enrol(node_id)
            return {_NODE_ID: node_id}

        device = "cpu" if worker.cuda_device is None else "cuda"
        labels = {"azu-name": worker.name, "azu-payout": worker.payout_address, "azu-device": device}
        options = (
            *("--address", head),
            *("--resources", json.dumps({"VRAM": worker.vram_bytes // MIB})),
            *("--labels", ",".join(f"{name}={value}" for name, value in labels.items())),
        )
        environment = LARGE_PAGES | self._environment(frozenset({"HF_TOKEN"}))
        environment[TERMS] = worker.terms.to_json()
        environment["CUDA_VISIBLE_DEVICES"] = worker.cuda_device or ""
        # Ray would hide the GPU from actors that request none; azu places by VRAM, and a node is one GPU.
        environment["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        environment["RAY_preload_python_modules"] = _PRELOADED
        # Ray sets it too late, after torch is imported: threads of several nodes on one machine would
        # wait for each other.
        environment.setdefault("OMP_NUM_THREADS", "1")
        return ProcessSpec(
            worker.name,
            self._start(str(worker.index), *options),
            environment,
            restart=True,
            each_start=each_start,
        )

    def _environment(self, left_out: frozenset[str]) -> dict[str, str]:
        # torch makes this folder at its import; in /tmp it would stay after the network.
        own = {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / "torch")}
        if self.home is not None:
            own["AZU_HOME"] = str(self.home)
        driver = driver_environment(self.token_path, self.tls, self.ip)
        return inherited_environment(left_out) | driver | own

    def _start(self, folder: str, *options: str) -> tuple[str, ...]:
        return (
            *(sys.executable, "-P", str(Path(ray_start.__file__)), "start"),
            *((ray_start.LIGHT,) if self.dashboard_port is None else ()),
            *("--block", "--disable-usage-stats"),
            # Nodes that start at once in one folder take the same names for their sockets.
            *("--temp-dir", str(self.folder / folder)),
            *("--num-cpus", "0", "--num-gpus", "0", "--object-store-memory", str(_OBJECT_STORE_BYTES)),
            # It sends every actor's lines to the driver's terminal; the log files are enough.
            *("--include-log-monitor", "false"),
            *("--node-ip-address", self.ip),
            *options,
        )


@contextmanager
def socket_folder(preferred: Path, user: UnixUser | None = None) -> Iterator[Path]:
    """Yield an empty folder for Ray: the preferred one if its path is short enough for sockets, else another.

    It belongs to the user that runs Ray. The preferred one stays, with the logs of this run, until the next
    run empties it.
    """
    if len(str(preferred)) + _SOCKET_SUFFIX > _MAX_SOCKET_PATH:
        with tempfile.TemporaryDirectory(prefix="azu-ray-", dir="/tmp", ignore_cleanup_errors=True) as short:
            yield _given(Path(short), user)
        return
    if preferred.exists():
        shutil.rmtree(preferred)
    preferred.mkdir(mode=0o700, parents=True)
    yield _given(preferred, user)


def _given(folder: Path, user: UnixUser | None) -> Path:
    if user is not None:
        os.chown(folder, user.uid, user.gid)
    return folder


def driver_environment(token_path: Path, tls: TlsFiles | None = None, ip: str = LOOPBACK) -> dict[str, str]:
    """Return the environment variables with which a process connects to the cluster whose head is at `ip`."""
    return {
        # Without it Ray takes an address that other machines reach for the loopback's, and listens there.
        ray_start.CLUSTERS: str(int(ip != LOOPBACK)),
        # A value that the user set for another cluster does not count here.
        "RAY_USE_TLS": "0",
        **({} if tls is None else tls.ray_environment()),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path.absolute()),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def inherited_environment(left_out: frozenset[str] = frozenset()) -> dict[str, str]:
    """Return this process's environment without secrets and without variables that change azu's cluster."""
    # RAY_ADDRESS names another cluster of the user.
    left_out |= _SECRETS | {"RAY_ADDRESS"}
    return {name: value for name, value in os.environ.items() if name not in left_out} | _ALWAYS


def cuda_devices() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return tuple(name for name in allowed.split(",") if name.strip())
    try:
        found = subprocess.run(
            ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader"),
            capture_output=True,
            text=True,
            timeout=_GPU_QUERY_TIMEOUT_S,
            check=True,
        )
    except (FileNotFoundError, subprocess.SubprocessError):
        return ()
    return tuple(found.stdout.split())
