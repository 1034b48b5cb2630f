"""Real LayerActors, each in a process of its own, before them the engine's loop without jobs and money."""

import asyncio
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle

from actors.layer import LayerActor
from azu.bench.model import BenchModel, ModelShape, balanced_boundary, bench_model, generate, random_prompts
from azu.bench.report import Measurement, call_apart, ray_here
from azu.engine.local import local_topology
from azu.engine.pipeline import EnginePipeline
from azu.engine.scheduler import SchedulerConfig
from azu.engine.scheduler import Sequence as EngineSequence
from azu.engine.stage_contract import StageSpec
from azu.errors import InternalError
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import StepResult
from azu.protocol.structure import Structure
from azu.protocol.topology import Stage, Topology
from azu.units import KIB, MIB

_TIMEOUT_S = 600.0
_BLOCK_SIZE = 16
_OWN_MIB = 600


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt that comes `after_s` seconds into the run and is continued greedily to the last token."""

    prompt: tuple[int, ...]
    max_tokens: int
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StreamTiming:
    """The tokens of a request, and when each was known, in seconds since the request came."""

    token_ids: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a run of requests. `busy` is the share of the run that each stage was computing."""

    answers: tuple[StreamTiming, ...]
    seconds: float
    busy: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens over the whole run's time."""
        return sum(len(answer.token_ids) for answer in self.answers) / self.seconds


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of a stage's process, now and at most so far, and of what it is there for: weights and KV."""

    resident_bytes: int
    peak_bytes: int
    weight_bytes: int
    kv_bytes: int

    @property
    def own_bytes(self) -> int:
        """The most that the process held beside weights and KV."""
        return self.peak_bytes - self.weight_bytes - self.kv_bytes

    def figure(self, stage: int) -> Measurement:
        """Return it beside the limit."""
        return Measurement(
            name=f"most memory of stage {stage} beside its weights and KV",
            unit="MiB",
            value=self.own_bytes / MIB,
            reference=_OWN_MIB,
            reference_name="the limit",
            at_most=1.0,
            notes={
                "weights MiB": self.weight_bytes / MIB,
                "KV MiB": self.kv_bytes / MIB,
                "all now MiB": self.resident_bytes / MIB,
            },
        )


class MeasuredStage(LayerActor):
    """A LayerActor that counts the seconds it computes."""

    def load(self, *args: Any, **kwargs: Any) -> None:
        """Load as a LayerActor does."""
        super().load(*args, **kwargs)
        self._computing_s = 0.0
        assert self._runner is not None, "a LayerActor that is loaded has one"
        run = self._runner.run

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            output = run(*args, **kwargs)
            self._computing_s += time.perf_counter() - started
            return output

        self._runner.run = timed  # type: ignore[method-assign] # to see it from outside

    def computing_s(self) -> float:
        """Return the seconds spent computing since the last question."""
        seconds, self._computing_s = self._computing_s, 0.0
        return seconds

    def resident_bytes(self) -> tuple[int, int]:
        """Return this process's memory, now and at most so far."""
        return psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


class Driver:
    """Runs requests through the first stage, as a Pipeline does, and notes when each token is known."""

    def __init__(self, structure: Structure, topology: Topology, scheduling: SchedulerConfig) -> None:
        self._engine = EnginePipeline(structure, topology, scheduling, eos_token_ids=())
        self._ids = iter(range(1, 1 << 30))
        self._running: dict[int, _BenchSequence] = {}
        self._failed: asyncio.Future[None] | None = None

    async def start(self, first_stage: ActorHandle) -> None:
        """Learn the first stage."""
        self._first = first_stage
        self._failed = asyncio.get_running_loop().create_future()

    async def run(self, requests: Sequence[Request]) -> tuple[list[StreamTiming], float]:
        """Run requests to their ends; raises what a stage reports."""
        assert self._failed is not None, "start() comes first"
        started = time.perf_counter()
        answers = asyncio.gather(*(self._one(request) for request in requests))
        either: list[asyncio.Future[Any]] = [answers, self._failed]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._failed.done():
            self._failed.result()
        return await answers, time.perf_counter() - started

    async def completed(self, result: StepResult) -> None:
        """Take the last stage's tokens and send the next step off."""
        updates = self._engine.complete(result)
        self._pump()
        now = time.perf_counter()
        for update in updates:
            running = self._running[update.sequence_id]
            running.token_ids += update.token_ids
            running.times += [now] * len(update.token_ids)
            if update.finish_reason is not None:
                running.ended.set_result(None)

    async def lost(self, stage: int, error: Exception, *_: object) -> None:
        """Hear that a stage failed: so does the run."""
        if self._failed is not None and not self._failed.done():
            self._failed.set_exception(InternalError(f"stage {stage}: {error}"))

    async def _one(self, request: Request) -> StreamTiming:
        await asyncio.sleep(request.after_s)
        sequence_id = next(self._ids)
        running = _BenchSequence([], [], asyncio.get_running_loop().create_future())
        self._running[sequence_id] = running
        sampling = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True)
        came = time.perf_counter()
        self._engine.add(EngineSequence(sequence_id, request.prompt, sampling))
        self._pump()
        await running.ended
        return StreamTiming(tuple(running.token_ids), tuple(when - came for when in running.times))

    def _pump(self) -> None:
        while (batch := self._engine.next_batch()) is not None:
            self._first.step.remote(batch, None)


@dataclass(slots=True)
class _BenchSequence:
    token_ids: list[int]
    times: list[float]
    ended: asyncio.Future[None]


class Deployment:
    """A model over stages of one thread each."""

    def __init__(
        self, structure: Structure, topology: Topology, driver: ActorHandle, stages: Sequence[ActorHandle]
    ) -> None:
        self._structure = structure
        self._topology = topology
        self._driver = driver
        self.stages = stages

    def run(self, requests: Sequence[Request]) -> Run:
        """Run requests to their ends."""
        self._computing()
        answers, seconds = ray.get(self._driver.run.remote(requests), timeout=_TIMEOUT_S)
        return Run(tuple(answers), seconds, tuple(each / seconds for each in self._computing()))

    def memory(self) -> tuple[Measurement, ...]:
        """Return what each stage's process holds, beside its limit."""
        held = ray.get([stage.resident_bytes.remote() for stage in self.stages], timeout=_TIMEOUT_S)
        return tuple(
            StageMemory(now, peak, self._weight_bytes(stage), self._kv_bytes(stage)).figure(stage.index)
            for (now, peak), stage in zip(held, self._topology.stages, strict=True)
        )

    def _weight_bytes(self, stage: Stage) -> int:
        layers = (self._structure.layer_shard(layer) for layer in range(stage.span.start, stage.span.end))
        edges = self._structure.edge_shards(stage.span.start, stage.span.end)
        return sum(shard.weight_bytes for shard in (*layers, *edges))

    def _kv_bytes(self, stage: Stage) -> int:
        layers = self._structure.layers[stage.span.start : stage.span.end]
        num_slots = self._topology.num_blocks * self._topology.block_size
        return num_slots * sum(layer.kv_bytes_per_token for layer in layers)

    def _computing(self) -> list[float]:
        computing: list[float] = ray.get(
            [stage.computing_s.remote() for stage in self.stages], timeout=_TIMEOUT_S
        )
        return computing


@contextmanager
def deployed(
    model: BenchModel, boundaries: Sequence[int], num_blocks: int, micro_batches: int | None = None
) -> Iterator[Deployment]:
    """Have a model's stages between the boundaries loaded, in Ray's running cluster."""
    structure = model.structure
    topology = local_topology(structure, boundaries, num_blocks=num_blocks, block_size=_BLOCK_SIZE)
    scheduling = SchedulerConfig(num_blocks, _BLOCK_SIZE, micro_batches=micro_batches)
    driver = ray.remote(Driver).options(num_cpus=0).remote(structure, topology, scheduling)
    actor = ray.remote(concurrency_groups={"control": 2})(MeasuredStage)
    stages = [actor.options(num_cpus=0).remote() for _ in topology.stages]
    try:
        paths = {shard.name: model.shards / shard.file_name for shard in structure.shards}
        loading = [
            stage.load.remote(
                StageSpec(
                    structure=structure,
                    stage=what,
                    epoch=topology.epoch,
                    num_blocks=num_blocks,
                    block_size=_BLOCK_SIZE,
                    shard_paths=paths,
                    config_folder=model.shards,
                    device="cpu",
                ),
                {},
                after,
                driver,
                _TIMEOUT_S,
            )
            for stage, what, after in zip(stages, topology.stages, [*stages[1:], None], strict=True)
        ]
        ray.get([*loading, driver.start.remote(stages[0])], timeout=_TIMEOUT_S)
        deployment = Deployment(structure, topology, driver, stages)
        # What is made at first use is not what is measured.
        deployment.run([Request(random_prompts(structure, 1, 4)[0], max_tokens=2)])
        yield deployment
    finally:
        for one in (driver, *stages):
            ray.kill(one)


_SHORT_TOKENS = 16
_LONG_TOKENS = 1024
_LONG_PROMPTS = 8
# The long prompts are well under way by then, and far from done.
_ARRIVES_AFTER_S = 3.0
_FIRST_TOKEN_BLOCKS = 640


def measure_first_token(shape: ModelShape) -> tuple[Measurement, ...]:
    """Return the short prompt's wait, held against three times its lone wait and one chunk; and memory."""
    model = bench_model(shape)
    boundary = balanced_boundary(model.structure, sampled_share=0.0)
    short = random_prompts(model.structure, 1, _SHORT_TOKENS)[0]
    *long, chunk = random_prompts(model.structure, _LONG_PROMPTS + 1, _LONG_TOKENS)
    chunk = chunk[: SchedulerConfig(1, 1).prefill_chunk_tokens]
    with ray_here(), deployed(model, (0, boundary, shape.num_layers), _FIRST_TOKEN_BLOCKS) as deployment:
        lone_s = deployment.run([Request(short, 1)]).answers[0].seconds[0]
        alone = deployment.run([Request(chunk, 1)])
        # In the crowd a chunk is one step; alone it is cut so that the stages overlap.
        chunk_s = sum(alone.busy) * alone.seconds
        crowd = [Request(prompt, 1) for prompt in long]
        run = deployment.run([*crowd, Request(short, 1, after_s=_ARRIVES_AFTER_S)])
        memory = deployment.memory()
    return (
        Measurement(
            name="first token of a short prompt behind 8 long ones",
            unit="s",
            value=run.answers[-1].seconds[0],
            reference=3 * lone_s + chunk_s,
            reference_name="3 times alone + one chunk",
            at_most=1.0,
            notes={"alone s": lone_s, "one chunk s": chunk_s, "all read s": run.seconds},
        ),
        *memory,
    )


PROMPT_TOKENS = 128
NEW_TOKENS = 64
_ONE_STREAM_TIMEOUT_S = 300.0
_ONE_STREAM_BLOCKS = 32


def measure_one_stream(shape: ModelShape) -> tuple[Measurement, ...]:
    """Return the speed of decoding."""
    model = bench_model(shape)
    boundary = balanced_boundary(model.structure)
    prompts = random_prompts(model.structure, 1, PROMPT_TOKENS)
    with ray_here(), deployed(model, (0, boundary, shape.num_layers), _ONE_STREAM_BLOCKS) as deployment:
        run = deployment.run([Request(prompts[0], NEW_TOKENS)])
    whole, tokens = call_apart(
        _ONE_STREAM_TIMEOUT_S, generate, model.source, prompts, NEW_TOKENS, num_threads=1
    )
    (answer,) = run.answers
    return (
        Measurement(
            name="one stream over 2 stages of 1 thread",
            unit="tokens/s",
            value=decode_tokens_per_s(answer),
            reference=whole.decode_tokens_per_s,
            reference_name="transformers, 1 thread",
            at_least=0.95,
            notes={
                "layers on the first stage": boundary,
                "first token s": answer.seconds[0],
                "transformers first token s": whole.seconds[0],
                "equal tokens": sum(a == b for a, b in zip(answer.token_ids, tokens[0], strict=True)),
            },
        ),
    )


def decode_tokens_per_s(answer: StreamTiming) -> float:
    """Return a stream's speed between its first token and its last."""
    return (len(answer.seconds) - 1) / (answer.seconds[-1] - answer.seconds[0])


_STREAMS = 16
_MANY_STREAMS_TIMEOUT_S = 300.0
_MANY_STREAMS_BLOCKS = 256


def measure_many_streams(shape: ModelShape) -> tuple[Measurement, ...]:
    """Return the speed of all streams together, prompts included, and how busy and how large stages were."""
    model = bench_model(shape)
    boundary = balanced_boundary(model.structure, NEW_TOKENS / (PROMPT_TOKENS + NEW_TOKENS))
    prompts = random_prompts(model.structure, _STREAMS, PROMPT_TOKENS)
    runs: dict[int | None, Run] = {}
    with ray_here():
        for micro_batches in (None, 1):
            stages = (0, boundary, shape.num_layers)
            with deployed(model, stages, _MANY_STREAMS_BLOCKS, micro_batches) as deployment:
                runs[micro_batches] = deployment.run([Request(prompt, NEW_TOKENS) for prompt in prompts])
                memory = deployment.memory()
    overlapped, in_turns = runs[None], runs[1]
    whole, tokens = call_apart(
        _MANY_STREAMS_TIMEOUT_S, generate, model.source, prompts, NEW_TOKENS, num_threads=2
    )
    equal = sum(
        list(answer.token_ids) == expected
        for answer, expected in zip(overlapped.answers, tokens, strict=True)
    )
    last_first_token = max(answer.seconds[0] for answer in overlapped.answers)
    return (
        Measurement(
            name="16 streams over 2 stages of 1 thread",
            unit="tokens/s",
            value=overlapped.tokens_per_s,
            reference=whole.total_tokens_per_s,
            reference_name="transformers, batch of 16, 2 threads",
            at_least=1.5,
            notes={
                "all prompts read s": last_first_token,
                "transformers all prompts read s": whole.seconds[0],
                "run s": overlapped.seconds,
                "transformers run s": whole.seconds[-1],
                "decode tokens/s": _decode_tokens_per_s(overlapped),
                "transformers decode tokens/s": whole.decode_tokens_per_s,
                "equal streams": equal,
            },
        ),
        Measurement(
            name="16 streams, 2 micro-batches",
            unit="tokens/s",
            value=overlapped.tokens_per_s,
            reference=in_turns.tokens_per_s,
            reference_name="the same stages, 1 micro-batch",
        ),
        *(
            Measurement(
                name=f"time stage {stage} computed",
                unit="s",
                value=busy * overlapped.seconds,
                reference=overlapped.seconds,
                reference_name="the whole run",
                at_least=0.9,
            )
            for stage, busy in enumerate(overlapped.busy)
        ),
        *memory,
    )


def _decode_tokens_per_s(run: Run) -> float:
    """Return the speed from when every stream had its first token until the first stream ended."""
    first = max(answer.seconds[0] for answer in run.answers)
    last = min(answer.seconds[-1] for answer in run.answers)
    per_stream = mean(sum(first < when <= last for when in answer.seconds) for answer in run.answers)
    return len(run.answers) * per_stream / (last - first)
