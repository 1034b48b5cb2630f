"""How long 8 KiB take from one actor to another, in calls that nobody waits for."""

import asyncio
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import ray
from ray.actor import ActorHandle

from azu.auth.api_keys import ApiKey
from azu.bench.model import BenchModel, ModelShape, balanced_boundary, bench_model, random_prompts
from azu.bench.report import Measurement, call_apart, ray_here
from azu.errors import Unavailable
from azu.launch.processes import ProcessGroup
from azu.launch.redis_server import start_redis, wait_for_redis
from azu.models import describe
from azu.models.cut import cut
from azu.money.books import Books
from azu.protocol.job import Receipt
from azu.protocol.step import Slice
from azu.redis_client import connect_redis
from azu.units import KIB, MIB, format_bytes

_FRAME_BYTES = 8 * 1024
_HOP_ROUNDS = 500
_HOP_TIMEOUT_S = 60.0
_LIMIT_MS = 1.0


class Bouncer:
    """Sends each frame back to where it came from."""

    def __init__(self) -> None:
        self._arrived: list[float] = []
        self._sent: Any = None

    def meet(self, other: ActorHandle) -> None:
        """Learn who sends frames."""
        self._other = other

    def bounce(self, frame: bytes, hops: int) -> None:
        """Send a frame on for as many hops as are left."""
        self._arrived.append(time.perf_counter())
        if hops:
            # The answer is this call's acknowledgement; it is let go when the next one has come.
            self._sent = self._other.bounce.remote(frame, hops - 1)

    def arrived(self) -> list[float]:
        """Return when frames came."""
        return self._arrived


def hops_s(left: ActorHandle, right: ActorHandle, frame_bytes: int, rounds: int) -> list[float]:
    """Have a frame go to and fro between two Bouncers; return half the time of each round."""
    ray.get([left.meet.remote(right), right.meet.remote(left)], timeout=_HOP_TIMEOUT_S)
    left.bounce.remote(bytes(frame_bytes), 2 * rounds)
    arrived: list[float] = []
    deadline = time.monotonic() + _HOP_TIMEOUT_S
    while len(arrived) <= rounds and time.monotonic() < deadline:
        time.sleep(1.0)
        arrived = ray.get(left.arrived.remote(), timeout=_HOP_TIMEOUT_S)
    return [(later - earlier) / 2 for earlier, later in pairwise(arrived)]


def measure_hop(_shape: ModelShape) -> tuple[Measurement, ...]:
    """Return the median of half a round between two actors."""
    with ray_here():
        left, right = (ray.remote(Bouncer).options(num_cpus=0).remote() for _ in range(2))
        hops = sorted(hops_s(left, right, _FRAME_BYTES, _HOP_ROUNDS))
    return (
        Measurement(
            name="hop of an 8 KiB frame between actors",
            unit="ms",
            value=median(hops) * 1e3,
            reference=_LIMIT_MS,
            reference_name="the limit",
            at_most=1.0,
            notes={"99th percentile ms": hops[len(hops) * 99 // 100] * 1e3},
        ),
    )


_STREAMS = 8
_PROMPT_TOKENS = 32
_NEW_TOKENS = 6
# One round in ten is disturbed by half: many short ones, in turns, tell three parts in a hundred.
_INPUT_LOG_ROUNDS = 40
_INPUT_LOG_TIMEOUT_S = 900.0


def measure_input_log(shape: ModelShape) -> tuple[Measurement, ...]:
    """Return the speed of streams over two stages with the log, and without it in turns."""
    model = bench_model(shape)
    keeping, forgetting = call_apart(_INPUT_LOG_TIMEOUT_S, _in_turns, model)
    return (
        Measurement(
            name=f"{_STREAMS} streams, inputs kept for a replay",
            unit="tokens/s",
            value=median(keeping),
            reference=median(forgetting),
            reference_name="the same stages, nothing kept",
            at_least=0.97,
            notes={"most with": max(keeping), "most without": max(forgetting), "rounds": _INPUT_LOG_ROUNDS},
        ),
    )


def _in_turns(model: BenchModel) -> tuple[list[float], list[float]]:
    """Return tokens per second of rounds with the log, and of rounds without."""
    from azu.engine.local import LocalPipeline, local_topology
    from azu.engine.stage_runner import SentLog
    from azu.protocol.sampling import SamplingParams

    class Nothing(SentLog):
        def record(self, slices: Iterable[Slice], payload: memoryview) -> None:
            """Keep nothing."""

    structure = model.structure
    topology = local_topology(structure, (0, balanced_boundary(structure), structure.num_layers))
    pipeline = LocalPipeline(structure, topology, model.shards)
    logs: tuple[list[SentLog], list[SentLog]] = (
        [stage._sent for stage in pipeline.stages],
        [Nothing(1, 0) for _ in pipeline.stages],
    )
    prompts = random_prompts(structure, _STREAMS, _PROMPT_TOKENS)
    sampling = SamplingParams(max_tokens=_NEW_TOKENS, ignore_eos=True)
    speeds: tuple[list[float], list[float]] = ([], [])
    pipeline.generate(prompts, sampling)  # what is made at the first step is made
    for turn in range(2 * _INPUT_LOG_ROUNDS):
        # With, without, without, with: what the machine does beside wears on both alike.
        which = (turn + 1) // 2 % 2
        for stage, log in zip(pipeline.stages, logs[which], strict=True):
            stage._sent = log
        started = time.perf_counter()
        pipeline.generate(prompts, sampling)
        speeds[which].append(_STREAMS * _NEW_TOKENS / (time.perf_counter() - started))
    return speeds


_JOBS = 2000
# Taken in turns, so that whatever else the machine does slows both.
_SETTLING_ROUNDS = 20
_AT_ONCE = 32
_SETTLING_START_TIMEOUT_S = 30.0
_USER = f"0x{1:040x}"
_WORKERS = tuple(f"0x{number:040x}" for number in (2, 3))
_CHARGED = 1000
_EXPIRES_AT_MS = 2**50


def measure_settling(_shape: ModelShape) -> tuple[Measurement, ...]:
    """Return the speed of settling jobs of two workers each."""
    with tempfile.TemporaryDirectory(prefix="azu-bench-") as folder, ProcessGroup(Path(folder)) as children:
        server = start_redis(children, Path(folder) / "redis")
        wait_for_redis(children, server, _SETTLING_START_TIMEOUT_S)
        settled_s, written_s = asyncio.run(_measure(server.urls.owner))
    return (
        Measurement(
            name="settlements on a flushing Redis",
            unit="per s",
            value=_JOBS / settled_s,
            reference=_JOBS / written_s,
            reference_name="bare SET, flushed",
            at_least=0.3,
            notes={"at once": _AT_ONCE},
        ),
    )


async def _measure(url: str) -> tuple[float, float]:
    books, redis = Books.from_url(url), connect_redis(url)
    try:
        await books.credit("bench", _USER, _JOBS * _CHARGED)
        await _all(range(_JOBS), lambda job: _reserve(books, job))
        settled_s = written_s = 0.0
        for start in range(_SETTLING_ROUNDS):
            jobs = range(start, _JOBS, _SETTLING_ROUNDS)
            written_s += await _all(jobs, lambda job: redis.set(f"bench:{job}", "x" * 100))
            settled_s += await _all(jobs, lambda job: books.settle(_receipt(job)))
        return settled_s, written_s
    finally:
        await books.close()
        await redis.aclose()


async def _reserve(books: Books, job: int) -> None:
    key = ApiKey(key_id="bench", address=_USER, label="", created_at_ms=0)
    await books.reserve(key, str(job), _CHARGED, now_ms=0, expires_at_ms=_EXPIRES_AT_MS)


def _receipt(job: int) -> Receipt:
    platform = _CHARGED // 5
    share = (_CHARGED - platform) // len(_WORKERS)
    return Receipt(
        job_id=str(job),
        address=_USER,
        model_id="bench",
        revision="",
        prompt_tokens=1,
        completion_tokens=1,
        num_layers=1,
        lamports_per_token_layer=_CHARGED // 2,
        charged_lamports=_CHARGED,
        released_lamports=0,
        platform_lamports=platform,
        worker_lamports=dict.fromkeys(_WORKERS, share),
        transfer_id=f"settle:{job}",
    )


async def _all(jobs: Iterable[int], call: Callable[[int], Awaitable[object]]) -> float:
    """Make the call for every job, so many at once; return the seconds it took."""

    async def work(waiting: Iterator[int]) -> None:
        for job in waiting:
            await call(job)

    waiting, started = iter(jobs), time.perf_counter()
    await asyncio.gather(*(work(waiting) for _ in range(_AT_ONCE)))
    return time.perf_counter() - started


_SHARDING_TIMEOUT_S = 300.0
_MIB = 1024 * 1024


def measure_sharding(shape: ModelShape) -> tuple[Measurement, ...]:
    """Return the speed of a cut, which checks every value, hashes and flushes what it writes."""
    model = bench_model(shape)
    weights = sorted(model.source.glob("*.safetensors"))
    num_bytes = sum(path.stat().st_size for path in weights)
    architecture = describe(model.source)
    with tempfile.TemporaryDirectory(prefix="azu-bench-") as folder:
        copied, shards = Path(folder) / "copied", Path(folder) / "shards"
        copied.mkdir()
        # What the disk still has to write of earlier runs is nobody's work here, and all is read from memory.
        os.sync()
        _read(weights)
        copy_s = _seconds(lambda: _cp(weights, copied))
        synced_s = copy_s + _seconds(os.sync)
        shutil.rmtree(copied)
        cut_s = _seconds(
            lambda: cut(
                model.source, shards, model_id="azu/bench", revision="bench", architecture=architecture
            )
        )
    return (
        Measurement(
            name="sharding",
            unit="MiB/s",
            value=num_bytes / cut_s / _MIB,
            reference=num_bytes / copy_s / _MIB,
            reference_name="cp",
            at_least=0.4,
            notes={"MiB": num_bytes / _MIB, "s": cut_s, "cp s": copy_s, "cp and sync s": synced_s},
        ),
    )


def _read(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            while file.read(16 * _MIB):
                pass


def _cp(files: list[Path], folder: Path) -> None:
    subprocess.run(["cp", *map(str, files), str(folder)], check=True, timeout=_SHARDING_TIMEOUT_S)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


_SIZES = {8 * KIB: 300, MIB: 40}  # and how often each goes there and back
_TLS_START_TIMEOUT_S = 120.0
_TLS_TIMEOUT_S = 400.0
_PAYOUT = "0x" + "00" * 20


def measure_tls(_shape: ModelShape) -> tuple[Measurement, ...]:
    """Return the median of half a round between two nodes of this machine, with TLS and without."""
    plain, encrypted = (call_apart(_TLS_TIMEOUT_S, _hops_ms, tls=tls) for tls in (False, True))
    return tuple(
        Measurement(
            name=f"hop of {format_bytes(size)} between nodes, encrypted",
            unit="ms",
            value=encrypted[size],
            reference=plain[size],
            reference_name="the same, not encrypted",
            notes={"TLS adds ms": encrypted[size] - plain[size]},
        )
        for size in _SIZES
    )


def _hops_ms(*, tls: bool) -> dict[int, float]:
    """Return the median hop of each size; runs in a process of its own, for Ray reads its settings once."""
    from azu.files import write_private
    from azu.launch.membership import head_files
    from azu.launch.processes import ProcessGroup, free_port
    from azu.launch.ray_nodes import HEAD, STARTED, RayHost, Worker, driver_environment

    with tempfile.TemporaryDirectory(prefix="azu-ray-", dir="/tmp", ignore_cleanup_errors=True) as made:
        folder, ip = Path(made), _own_address()
        files = head_files(folder / "tls", [ip]) if tls else None
        host = RayHost(folder, folder / "token", ip, tls=files)
        write_private(host.token_path, secrets.token_hex(32))
        # The bench's own cluster has another token.
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.update(driver_environment(host.token_path, files))
        port = free_port()
        head = f"{ip}:{port}"
        workers = [Worker(index, f"node-{index}", MIB, _PAYOUT) for index in range(2)]
        with ProcessGroup(folder / "logs") as nodes:
            nodes.start(host.head(port))
            for worker in workers:
                nodes.start(host.worker(head, worker))
            for name in (HEAD, *(worker.name for worker in workers)):
                nodes.wait_until_printed(name, STARTED, _TLS_START_TIMEOUT_S)
            return {size: _hop_ms(head, size, rounds) for size, rounds in _SIZES.items()}


def _hop_ms(head: str, size: int, rounds: int) -> float:
    import ray

    ray.init(head, namespace="azu", log_to_driver=False, logging_level="error")
    try:
        left, right = (
            ray.remote(Bouncer).options(num_cpus=0, label_selector={"azu-name": f"node-{index}"}).remote()
            for index in range(2)
        )
        return median(hops_s(left, right, size, rounds)) * 1e3
    finally:
        ray.shutdown()


def _own_address() -> str:
    """Return this machine's address, as Ray would find it: a certificate has to name it."""
    from azu.launch.processes import address_towards

    try:
        return address_towards("http://192.0.2.1")
    except Unavailable:
        return "127.0.0.1"
