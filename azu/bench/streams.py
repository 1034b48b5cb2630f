"""Streams over real LayerActors, each in a process of its own, run without jobs and money."""

import asyncio
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from operator import eq
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle

from actors.layer import LayerActor
from azu.bench.model import (
    BenchModel,
    ModelShape,
    Run,
    StreamTiming,
    balanced_boundary,
    bench_model,
    random_prompts,
    run_transformers,
)
from azu.bench.report import Measurement, Measurements, call_apart, ray_here
from azu.engine.local import local_topology
from azu.engine.pipeline import EnginePipeline
from azu.engine.scheduler import SchedulerConfig
from azu.engine.scheduler import Sequence as EngineSequence
from azu.engine.stage_contract import Handoff, StageSpec
from azu.errors import InternalError
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import StepBatch, StepResult
from azu.protocol.structure import Structure
from azu.protocol.topology import Stage, Topology
from azu.units import KIB, MIB

_TIMEOUT_S = 600.0
_BLOCK_SIZE = 16
# What a stage's process may hold beside weights and KV.
_OWN_MIB = 600
_PROMPT_TOKENS = 128
_NEW_TOKENS = 64
_STREAMS = 16
_SHORT_TOKENS = 16
_LONG_TOKENS = 1024
_LONG_PROMPTS = 8
# By then the long prompts are well under way, and far from done.
_ARRIVES_AFTER_S = 3.0


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt that comes `after_s` seconds into the run and is continued greedily to the last token."""

    prompt: tuple[int, ...]
    max_tokens: int
    after_s: float = 0.0


def measure_one_stream(shape: ModelShape) -> Measurements:
    """Return the speed of decoding."""
    model = bench_model(shape)
    boundary = balanced_boundary(model.structure)
    prompts = random_prompts(model.structure, 1, _PROMPT_TOKENS)
    with ray_here(), deployed(model, (0, boundary, model.structure.num_layers), 32) as deployment:
        run = deployment.run([Request(prompts[0], _NEW_TOKENS)])
    theirs = call_apart(_TIMEOUT_S, run_transformers, model, prompts, _NEW_TOKENS, threads=1)
    notes = {
        "layers on the first stage": boundary,
        "first token s": run.all_read_s,
        "transformers first token s": theirs.all_read_s,
        "equal tokens": sum(map(eq, run.answers[0].token_ids, theirs.answers[0].token_ids)),
    }
    name, reference = "one stream over 2 stages of 1 thread", "transformers, 1 thread"
    speeds = run.decode_tokens_per_s, theirs.decode_tokens_per_s
    return [Measurement(name, "tokens/s", *speeds, reference, at_least=0.95, notes=notes)]


def measure_many_streams(shape: ModelShape) -> Measurements:
    """Return the speed of all streams together, prompts included, and how busy and how large stages were."""
    model = bench_model(shape)
    boundary = balanced_boundary(model.structure, _NEW_TOKENS / (_PROMPT_TOKENS + _NEW_TOKENS))
    prompts = random_prompts(model.structure, _STREAMS, _PROMPT_TOKENS)
    stages, runs = (0, boundary, model.structure.num_layers), []
    with ray_here():
        for micro_batches in (None, 1):
            with deployed(model, stages, 256, micro_batches) as deployment:
                runs.append(deployment.run([Request(prompt, _NEW_TOKENS) for prompt in prompts]))
                memory = deployment.memory()
    run, one_batch = runs
    theirs = call_apart(_TIMEOUT_S, run_transformers, model, prompts, _NEW_TOKENS, threads=2)
    tokens, their_tokens = ([stream.token_ids for stream in each.answers] for each in (run, theirs))
    notes = {
        "all prompts read s": run.all_read_s,
        "transformers all prompts read s": theirs.all_read_s,
        "run s": run.seconds,
        "transformers run s": theirs.seconds,
        "decode tokens/s": run.decode_tokens_per_s,
        "transformers decode tokens/s": theirs.decode_tokens_per_s,
        "equal streams": sum(map(eq, tokens, their_tokens)),
    }
    name, reference = "16 streams over 2 stages of 1 thread", "transformers, batch of 16, 2 threads"
    halves, whole = "16 streams, 2 micro-batches", "the same stages, 1 micro-batch"
    times = [(f"time stage {stage} computed", "s", busy * run.seconds) for stage, busy in enumerate(run.busy)]
    speed = run.tokens_per_s
    return [
        Measurement(name, "tokens/s", speed, theirs.tokens_per_s, reference, at_least=1.5, notes=notes),
        Measurement(halves, "tokens/s", speed, one_batch.tokens_per_s, whole),
        *(Measurement(*time, run.seconds, "the whole run", at_least=0.9) for time in times),
        *memory,
    ]


def measure_first_token(shape: ModelShape) -> Measurements:
    """Return the short prompt's wait, beside three times its wait alone and one chunk; and memory."""
    model = bench_model(shape)
    boundary = balanced_boundary(model.structure, sampled_share=0.0)
    short = random_prompts(model.structure, 1, _SHORT_TOKENS)[0]
    *long, chunk = random_prompts(model.structure, _LONG_PROMPTS + 1, _LONG_TOKENS)
    chunk = chunk[: SchedulerConfig(1, 1).prefill_chunk_tokens]
    with ray_here(), deployed(model, (0, boundary, model.structure.num_layers), 640) as deployment:
        lone_s = deployment.run([Request(short, 1)]).all_read_s
        alone = deployment.run([Request(chunk, 1)])
        # Beside others a chunk is one step; alone it is cut so that the stages overlap.
        chunk_s = sum(alone.busy) * alone.seconds
        crowd = [Request(prompt, 1) for prompt in long]
        run = deployment.run([*crowd, Request(short, 1, after_s=_ARRIVES_AFTER_S)])
        memory = deployment.memory()
    name, reference = "first token of a short prompt behind 8 long ones", "3 times alone + one chunk"
    waits = run.answers[-1].seconds[0], 3 * lone_s + chunk_s
    notes = {"alone s": lone_s, "one chunk s": chunk_s, "all read s": run.seconds}
    return [Measurement(name, "s", *waits, reference, at_most=1.0, notes=notes), *memory]


class MeasuredStage(LayerActor):
    """A LayerActor that counts the seconds it computes."""

    def load(self, *args: Any, **kwargs: Any) -> None:
        """Load as a LayerActor does."""
        super().load(*args, **kwargs)
        self._computing_s = 0.0
        assert self._runner is not None, "a LayerActor that is loaded has one"
        run = self._runner.run

        def timed(batch: StepBatch, frame: bytes | None) -> Handoff | StepResult:
            started = time.perf_counter()
            output = run(batch, frame)
            self._computing_s += time.perf_counter() - started
            return output

        self._runner.run = timed  # type: ignore[method-assign] # to see it from outside

    def usage(self) -> tuple[float, int, int]:
        """Return the seconds computed so far, and this process's memory in bytes, now and at most so far."""
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
        return self._computing_s, psutil.Process().memory_info().rss, most


class Driver:
    """Runs requests through the first stage, as a Pipeline does, and notes when each token is known."""

    def __init__(
        self, structure: Structure, topology: Topology, scheduling: SchedulerConfig, first_stage: ActorHandle
    ) -> None:
        self._engine = EnginePipeline(structure, topology, scheduling, ends=())
        self._first_stage = first_stage
        self._ids = count(1)
        self._running: dict[int, tuple[StreamTiming, asyncio.Future[None]]] = {}

    async def run(self, requests: Sequence[Request]) -> tuple[list[StreamTiming], float]:
        """Run requests to their ends; raises what a stage reports."""
        started = time.perf_counter()
        return await asyncio.gather(*map(self._stream, requests)), time.perf_counter() - started

    async def completed(self, result: StepResult) -> None:
        """Take the last stage's tokens and send the next step off."""
        events = self._engine.complete(result)
        self._send()
        now = time.perf_counter()
        for sequence_id, event in events.items():
            timing, ended = self._running[sequence_id]
            timing.token_ids.extend(event.token_ids)
            timing.seconds.extend([now] * len(event.token_ids))
            if event.finish_reason is not None:
                ended.set_result(None)

    async def lost(self, pieces: object, error: object, *_blame: object) -> None:
        """End the run because of a stage that failed."""
        for _, ended in self._running.values():
            if not ended.done():
                ended.set_exception(InternalError(f"{pieces}: {error}"))

    async def _stream(self, request: Request) -> StreamTiming:
        await asyncio.sleep(request.after_s)
        sequence_id, came_s = next(self._ids), time.perf_counter()
        timing, ended = StreamTiming([], []), asyncio.get_running_loop().create_future()
        self._running[sequence_id] = timing, ended
        sampling = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True)
        self._engine.add(EngineSequence(sequence_id, request.prompt, sampling))
        self._send()
        await ended
        return StreamTiming(timing.token_ids, [at - came_s for at in timing.seconds])

    def _send(self) -> None:
        while (batch := self._engine.next_batch()) is not None:
            self._first_stage.step.remote(batch, None)


@dataclass(frozen=True, slots=True)
class BenchDeployment:
    """A model over stages of one thread each."""

    structure: Structure
    topology: Topology
    driver: ActorHandle
    stages: Sequence[ActorHandle]

    def run(self, requests: Sequence[Request]) -> Run:
        """Run requests to their ends."""
        before = self._usage()
        answers, seconds = ray.get(self.driver.run.remote(requests), timeout=_TIMEOUT_S)
        busy = ((now[0] - then[0]) / seconds for now, then in zip(self._usage(), before, strict=True))
        return Run(answers, seconds, tuple(busy))

    def memory(self) -> Measurements:
        """Return what each stage's process holds beside weights and KV, and the limit."""
        return list(map(self._memory, self.topology.stages, self._usage()))

    def _memory(self, stage: Stage, usage: tuple[float, int, int]) -> Measurement:
        span, structure = stage.span, self.structure
        _, now, most = usage
        shards = [structure.layer_shard(layer) for layer in range(span.start, span.end)]
        shards += structure.edge_shards(span.start, span.end)
        weights = sum(shard.weight_bytes for shard in shards)
        slots = self.topology.num_blocks * self.topology.block_size
        kv = slots * sum(layer.kv_bytes_per_token for layer in structure.layers[span.start : span.end])
        name = f"most memory of stage {stage.index} beside its weights and KV"
        notes = {"weights MiB": weights / MIB, "KV MiB": kv / MIB, "all now MiB": now / MIB}
        own = (most - weights - kv) / MIB
        return Measurement(name, "MiB", own, _OWN_MIB, "the limit", at_most=1.0, notes=notes)

    def _usage(self) -> list[tuple[float, int, int]]:
        usage: list[tuple[float, int, int]] = ray.get(
            [stage.usage.remote() for stage in self.stages], timeout=_TIMEOUT_S
        )
        return usage


@contextmanager
def deployed(
    model: BenchModel, boundaries: Sequence[int], num_blocks: int, micro_batches: int | None = None
) -> Iterator[BenchDeployment]:
    """Load a model's stages between the boundaries, in Ray's running cluster."""
    structure = model.structure
    topology = local_topology(structure, boundaries, num_blocks=num_blocks, block_size=_BLOCK_SIZE)
    scheduling = SchedulerConfig(num_blocks, _BLOCK_SIZE, micro_batches=micro_batches)
    actor = ray.remote(concurrency_groups={"control": 2})(MeasuredStage)
    stages = [actor.options(num_cpus=0).remote() for _ in topology.stages]
    driver = ray.remote(Driver).options(num_cpus=0).remote(structure, topology, scheduling, stages[0])
    paths = {shard.name: model.shards / shard.file_name for shard in structure.shards}
    try:
        loading = []
        for stage, what, after in zip(stages, topology.stages, [*stages[1:], None], strict=True):
            spec = StageSpec(
                structure=structure,
                stage=what,
                topology=topology,
                shard_paths=paths,
                config_folder=model.shards,
                device="cpu",
            )
            loading.append(stage.load.remote(spec, {}, after, driver, _TIMEOUT_S))
        ray.get(loading, timeout=_TIMEOUT_S)
        deployment = BenchDeployment(structure, topology, driver, stages)
        # What is made at first use is not measured.
        deployment.run([Request(random_prompts(structure, 1, 4)[0], max_tokens=2)])
        yield deployment
    finally:
        for one in (driver, *stages):
            ray.kill(one)
