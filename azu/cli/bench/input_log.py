"""What it costs a stage to keep what it sent, so that a lost receiver can be filled again."""

import time
from collections.abc import Iterable
from statistics import median

from azu.cli.bench.apart import call_apart
from azu.cli.bench.model import BenchModel, balanced_boundary, bench_model, random_prompts
from azu.cli.bench.results import Figure
from azu.engine.reference import ModelShape
from azu.protocol.step import Slice

_STREAMS = 8
_PROMPT_TOKENS = 32
_NEW_TOKENS = 6
# One round in ten is disturbed by half: many short ones, in turns, tell three parts in a hundred.
_ROUNDS = 40
_TIMEOUT_S = 900.0


def measure(shape: ModelShape) -> tuple[Figure, ...]:
    """Return the speed of streams over two stages with the log, and without it in turns."""
    model = bench_model(shape)
    keeping, forgetting = call_apart(_TIMEOUT_S, _in_turns, model)
    return (
        Figure(
            name=f"{_STREAMS} streams, inputs kept for a replay",
            unit="tokens/s",
            value=median(keeping),
            reference=median(forgetting),
            reference_name="the same stages, nothing kept",
            at_least=0.97,
            notes={"most with": max(keeping), "most without": max(forgetting), "rounds": _ROUNDS},
        ),
    )


def _in_turns(model: BenchModel) -> tuple[list[float], list[float]]:
    """Return tokens per second of rounds with the log, and of rounds without."""
    from azu.engine.local import LocalPipeline, local_topology
    from azu.engine.sent_log import SentLog
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
    for turn in range(2 * _ROUNDS):
        # With, without, without, with: what the machine does beside wears on both alike.
        which = (turn + 1) // 2 % 2
        for stage, log in zip(pipeline.stages, logs[which], strict=True):
            stage._sent = log
        started = time.perf_counter()
        pipeline.generate(prompts, sampling)
        speeds[which].append(_STREAMS * _NEW_TOKENS / (time.perf_counter() - started))
    return speeds
