"""Measurements of one part each: settlements, a cut, hops between actors, and the log of inputs."""

import asyncio
import logging
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import ray
from ray.actor import ActorHandle

from actors.placement import NAMESPACE
from azu.auth.key_records import SECRET_BYTES, ApiKey, key_id_of, key_text, new_secret, secret_digest
from azu.bench.model import BenchModel, ModelShape, balanced_boundary, bench_model, cut_model, random_prompts
from azu.bench.report import Measurement, Measurements, call_apart, in_turns, ray_here, seconds_of
from azu.clock import wall_clock_ms
from azu.config import Settings
from azu.errors import Unavailable
from azu.files import write_private
from azu.launch.membership import head_files
from azu.launch.processes import ProcessGroup, address_towards, free_port, variables_set
from azu.launch.ray_nodes import HEAD, STARTED, RayHost, Worker, driver_environment
from azu.launch.redis_server import BOOKS_STORE, start_redis, wait_for_redis
from azu.launch.sidecars import BOOKS, BOOKS_READY, ChainSettings, start_books
from azu.models import describe
from azu.money.books import Books, BooksTerms
from azu.money.ledger.transfers import Deposit
from azu.money.wire import Access
from azu.protocol.job import FinishReason, JobEnding, JobState
from azu.protocol.step import Slice
from azu.redis_client import connect_redis
from azu.units import KIB, MIB, format_bytes

_START_TIMEOUT_S = 120.0
_TIMEOUT_S = 900.0

_JOBS = 2000
_ROUNDS = 20
_AT_ONCE = 32
_PLATFORM, *_WORKERS = (f"0x{number:040x}" for number in (1, 2, 3))
_CHARGED = 1000


def measure_settling(_shape: ModelShape) -> Measurements:
    """Return the speed of settling jobs of two workers each."""
    with tempfile.TemporaryDirectory(prefix="azu-bench-") as folder, ProcessGroup(Path(folder)) as children:
        server = start_redis(children, BOOKS_STORE, Path(folder) / "redis")
        wait_for_redis(children, server, _START_TIMEOUT_S)
        settings = Settings.from_environment().model_copy(update={"home": Path(folder)})
        chain = ChainSettings("", _PLATFORM, is_devnet=True, signer_key={})
        terms = BooksTerms(
            1,
            20,
            reservation_ttl_ms=3_600_000,
            max_keys=1,
            max_nodes=1,
            max_unfunded_keys=1,
            unfunded_key_ms=3_600_000,
            max_reservations=_JOBS,
        )
        access = start_books(children, settings, chain, server.url("books"), terms)
        children.wait_until_printed(BOOKS, BOOKS_READY, _START_TIMEOUT_S)
        written_s, settled_s = _settle_all(server.owner, access)
    name, notes = "settlements by the books on a flushing Redis", {"at once": _AT_ONCE}
    speed, writes = _JOBS / sum(settled_s), _JOBS / sum(written_s)
    return [Measurement(name, "per s", speed, writes, "bare SET, flushed", at_least=0.3, notes=notes)]


def _settle_all(redis_url: str, access: Access) -> tuple[list[float], list[float]]:
    """Return the seconds of each round of bare writes, and of each round of settlements."""
    redis = connect_redis(redis_url)
    callers = ("ingress", "scheduler", "treasury", "owner")
    ingress, scheduler, treasury, owner = (Books(access.url(name)) for name in callers)
    bearer = new_secret(secrets.token_bytes(SECRET_BYTES))
    work = {0: dict.fromkeys(_WORKERS, 1)}
    ending = JobEnding(JobState.DONE, FinishReason.STOP)

    async def open_account() -> None:
        key = _opened_key(bearer)
        await treasury.apply(
            Deposit(id="deposit:bench", address=key.address, lamports=_JOBS * _CHARGED, at_ms=1)
        )
        await ingress.open_key(key)
        for node in _WORKERS:
            await owner.enrol_node(node, node, key_digest=node, name=node, work_bytes_per_s=0)

    async def write(job: int) -> None:
        await redis.set(f"bench:{job}", "x" * 100)

    async def reserve(job: int) -> None:
        await ingress.reserve(
            bearer, f"job-{job}", model_id="azu/bench", revision="bench", num_layers=1, prompt_tokens=1,
            max_tokens=_CHARGED - 1,
        )  # fmt: skip

    async def settle(job: int) -> None:
        await scheduler.settle(
            f"job-{job}", prompt_tokens=1, completion_tokens=_CHARGED - 1, work=work, ending=ending
        )

    async def each(jobs: Iterable[int], call: Callable[[int], Awaitable[None]]) -> None:
        """Make the call for every job, _AT_ONCE of them at once."""

        async def work_off(waiting: Iterator[int]) -> None:
            for job in waiting:
                await call(job)

        waiting = iter(jobs)
        await asyncio.gather(*(work_off(waiting) for _ in range(_AT_ONCE)))

    def round_of(call: Callable[[int], Awaitable[None]]) -> Callable[[int], None]:
        return lambda number: loop.run(each(range(number, _JOBS, _ROUNDS), call))

    with asyncio.Runner() as loop:
        loop.run(open_account())
        loop.run(each(range(_JOBS), reserve))
        seconds = in_turns(_ROUNDS, round_of(write), round_of(settle))
        for books in (ingress, scheduler, treasury, owner):
            loop.run(books.close())
        loop.run(redis.aclose())
    return seconds


def _opened_key(bearer: str) -> ApiKey:
    """Return the record of a key with a secret, signed by a new wallet."""
    from eth_account import Account
    from eth_account.messages import encode_defunct

    account, digest = Account.create(), secret_digest(bearer)
    key = ApiKey(key_id_of(digest), digest, account.address.lower(), "bench", wall_clock_ms())
    text = key_text(key, _PLATFORM, "azu.bench", "0")
    signature = account.sign_message(encode_defunct(text=text)).signature.to_0x_hex()
    return replace(key, text=text, signature=signature)


def measure_sharding(shape: ModelShape) -> Measurements:
    """Return the speed of a cut, which checks every value, hashes and flushes what it writes."""
    model = bench_model(shape)
    weights = sorted(model.source.glob("*.safetensors"))
    mib = sum(path.stat().st_size for path in weights) / MIB
    architecture = describe(model.source)
    with tempfile.TemporaryDirectory(prefix="azu-bench-") as folder:
        copied, shards = Path(folder) / "copied", Path(folder) / "shards"
        copied.mkdir()
        # The disk has nothing left to write of earlier runs, and all weights are read from memory.
        os.sync()
        _run("cat", *weights)
        copy_s = seconds_of(_run, "cp", *weights, copied)
        synced_s = copy_s + seconds_of(os.sync)
        shutil.rmtree(copied)
        cut_s = seconds_of(cut_model, model.source, shards, architecture)
    notes = {"MiB": mib, "s": cut_s, "cp s": copy_s, "cp and sync s": synced_s}
    return [Measurement("sharding", "MiB/s", mib / cut_s, mib / copy_s, "cp", at_least=0.4, notes=notes)]


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, timeout=_TIMEOUT_S, stdout=subprocess.DEVNULL)


_HOPS = {8 * KIB: 300, MIB: 40}  # size of a frame, and how often one goes to and fro
_LIMIT_MS = 1.0
_NODES = ("node-0", "node-1")


class Bouncer:
    """Sends each frame back to the actor that it came from."""

    def __init__(self) -> None:
        self._arrived: list[float] = []

    def meet(self, other: ActorHandle) -> None:
        """Set the actor that frames are sent to."""
        self._other = other

    def bounce(self, frame: bytes, hops: int) -> None:
        """Send a frame on for as many hops as are left."""
        self._arrived.append(time.perf_counter())
        if hops:
            # The result is this call's acknowledgement; it is let go when the next one has come.
            self._sent = self._other.bounce.remote(frame, hops - 1)

    def arrived(self) -> list[float]:
        """Return when frames came."""
        return self._arrived


def measure_hop(_shape: ModelShape) -> Measurements:
    """Return the median of half a round between two actors."""
    with ray_here():
        hops = _hops_ms(8 * KIB, 500)
    name = "hop of an 8 KiB frame between actors"
    notes = {"99th percentile ms": sorted(hops)[len(hops) * 99 // 100]}
    return [Measurement(name, "ms", median(hops), _LIMIT_MS, "the limit", at_most=1.0, notes=notes)]


def measure_tls(_shape: ModelShape) -> Measurements:
    """Return the median of half a round between two nodes of this machine, with TLS and without."""
    plain, with_tls = (_hops_between_nodes(tls=tls) for tls in (False, True))
    found = []
    for size in _HOPS:
        name = f"hop of {format_bytes(size)} between nodes, encrypted"
        notes = {"TLS adds ms": with_tls[size] - plain[size]}
        found.append(
            Measurement(name, "ms", with_tls[size], plain[size], "the same, not encrypted", notes=notes)
        )
    return found


def _hops_ms(frame_bytes: int, rounds: int, nodes: tuple[str, str] | None = None) -> list[float]:
    """Have a frame go to and fro between two actors, each on its node; return half the time of each round."""
    left, right = (
        ray.remote(Bouncer).options(num_cpus=0, label_selector={"azu-name": name} if name else None).remote()
        for name in nodes or (None, None)
    )
    ray.get([left.meet.remote(right), right.meet.remote(left)], timeout=_START_TIMEOUT_S)
    left.bounce.remote(bytes(frame_bytes), 2 * rounds)
    arrived: list[float] = []
    deadline = time.monotonic() + _START_TIMEOUT_S
    while len(arrived) <= rounds and time.monotonic() < deadline:
        time.sleep(1.0)
        arrived = ray.get(left.arrived.remote(), timeout=_START_TIMEOUT_S)
    return [(later - earlier) / 2 * 1e3 for earlier, later in pairwise(arrived)]


def _hops_between_nodes(*, tls: bool) -> dict[int, float]:
    """Return the median hop of each size between two nodes of a cluster that is started for it."""
    with tempfile.TemporaryDirectory(prefix="azu-ray-", dir="/tmp", ignore_cleanup_errors=True) as made:
        folder, ip, port = Path(made), _own_address(), free_port()
        files = head_files(folder, [ip]).ray if tls else None
        host = RayHost(folder, folder / "token", ip, tls=files)
        token = secrets.token_hex(32)
        write_private(host.token_path, token)
        settings = driver_environment(host.token_path, files, ip) | {"RAY_AUTH_TOKEN": token}
        with variables_set(settings), ProcessGroup(folder / "logs") as processes:
            processes.start(host.head(port))
            for index, name in enumerate(_NODES):
                processes.start(host.worker(f"{ip}:{port}", Worker(index, name, MIB, f"0x{0:040x}")))
            for name in (HEAD, *_NODES):
                processes.wait_until_printed(name, STARTED, _START_TIMEOUT_S)
            # Ray reads whether it uses TLS when it is imported, as this process has done.
            return call_apart(_TIMEOUT_S, _hops_at, f"{ip}:{port}")


def _hops_at(head: str) -> dict[int, float]:
    ray.init(head, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    try:
        return {size: median(_hops_ms(size, rounds, _NODES)) for size, rounds in _HOPS.items()}
    finally:
        ray.shutdown()


def _own_address() -> str:
    """Return this machine's address, as Ray finds it: a certificate has to name it."""
    try:
        return address_towards("http://192.0.2.1")
    except Unavailable:
        return "127.0.0.1"


_STREAMS = 8
_PROMPT_TOKENS = 32
_NEW_TOKENS = 6
# One round in ten is disturbed by half: many short ones, in turns, show a difference of three in a hundred.
_LOG_ROUNDS = 40


def measure_input_log(shape: ModelShape) -> Measurements:
    """Return the speed of streams over two stages with the log, and without it in turns."""
    model = bench_model(shape)
    keeping, forgetting = (
        [_STREAMS * _NEW_TOKENS / seconds for seconds in each]
        for each in call_apart(_TIMEOUT_S, _with_and_without_log, model)
    )
    name, speeds = f"{_STREAMS} streams, inputs kept for a replay", (median(keeping), median(forgetting))
    reference = "the same stages, nothing kept"
    notes = {"most with": max(keeping), "most without": max(forgetting), "rounds": _LOG_ROUNDS}
    return [Measurement(name, "tokens/s", *speeds, reference, at_least=0.97, notes=notes)]


def _with_and_without_log(model: BenchModel) -> tuple[list[float], list[float]]:
    """Return the seconds of rounds with the log, and of rounds without."""
    from azu.engine.local import LocalPipeline, local_topology
    from azu.engine.stage_runner import SentLog
    from azu.protocol.sampling import SamplingParams

    class NoLog(SentLog):
        def record(self, slices: Iterable[Slice], payload: memoryview) -> None:
            """Keep nothing."""

    structure = model.structure
    topology = local_topology(structure, (0, balanced_boundary(structure), structure.num_layers))
    pipeline = LocalPipeline(structure, topology, model.shards)
    prompts = random_prompts(structure, _STREAMS, _PROMPT_TOKENS)
    sampling = SamplingParams(max_tokens=_NEW_TOKENS, ignore_eos=True)

    def round_with(logs: list[SentLog]) -> Callable[[int], object]:
        def run(_: int) -> None:
            for stage, log in zip(pipeline.stages, logs, strict=True):
                stage._sent = log
            pipeline.generate(prompts, sampling)

        return run

    pipeline.generate(prompts, sampling)  # what is made at the first step is made
    return in_turns(
        _LOG_ROUNDS,
        round_with([stage._sent for stage in pipeline.stages]),
        round_with([NoLog(1, 0) for _ in pipeline.stages]),
    )


_VOCABULARY = 128_256
_ROWS = 64
_SAMPLING_ROUNDS = 7


def measure_sampling(_shape: ModelShape) -> Measurements:
    """Return the time of choosing a token for each of 64 sequences, beside one search or sort."""
    name = f"{_ROWS} tokens of {_VOCABULARY:,}"
    one_search, one_sort = "their highest 1,024, with one thread", "one full sort, with one thread"
    limits = {
        "temperature 0.7, top_p 0.9, peaked": (one_search, 2.0),
        "temperature 1, top_p 1": (one_search, 1.5),
        "temperature 0.7, top_p 0.9, flat": (one_sort, 1.2),
        "every other one greedy": ("all at temperature 0.7, top_p 0.9", 1.0),
    }
    figures = []
    for (what, (reference, at_most)), seconds in zip(
        limits.items(), call_apart(_TIMEOUT_S, _sampling_seconds), strict=True
    ):
        value, compared = (1000 * median(each) for each in seconds)
        figures.append(Measurement(f"{name}, {what}", "ms", value, compared, reference, at_most=at_most))
    return figures


def _sampling_seconds() -> list[tuple[list[float], list[float]]]:
    """Return the seconds of rounds of sampling, and of rounds of what they are compared with."""
    import torch

    from azu.engine.malloc import keep_between_steps
    from azu.engine.opening import opened
    from azu.engine.sampler import Sampler
    from azu.protocol.sampling import SamplingParams

    torch.set_num_threads(1)  # as a stage on a CPU has
    keep_between_steps()
    flat = torch.randn(_ROWS, _VOCABULARY, generator=torch.Generator().manual_seed(1))
    peaked = flat * 3
    nucleus = SamplingParams(max_tokens=1, temperature=0.7, top_p=0.9)
    whole, greedy = SamplingParams(max_tokens=1, temperature=1.0), SamplingParams(max_tokens=1)

    def sampling(logits: torch.Tensor, *each: SamplingParams) -> Callable[[int], object]:
        sampler = Sampler()
        sampler.open(opened(row, (row,), each[row % len(each)]) for row in range(_ROWS))
        return lambda _: sampler.sample(range(_ROWS), logits)

    def search(_: int) -> object:
        return peaked.topk(1024)

    def sort(_: int) -> object:
        return flat.sort(descending=True)

    pairs = [
        (sampling(peaked, nucleus), search),
        (sampling(flat, whole), search),
        (sampling(flat, nucleus), sort),
        (sampling(peaked, nucleus, greedy), sampling(peaked, nucleus)),
    ]
    with torch.inference_mode():
        return [in_turns(_SAMPLING_ROUNDS, *pair) for pair in pairs]
