"""Sixteen streams over two stages of one thread each, beside transformers' static batch with two threads."""

from statistics import mean

from azu.cli.bench.apart import call_apart
from azu.cli.bench.cluster import ray_here
from azu.cli.bench.model import balanced_boundary, bench_model, random_prompts
from azu.cli.bench.one_stream import NEW_TOKENS, PROMPT_TOKENS
from azu.cli.bench.results import Figure
from azu.cli.bench.stages import Request, Run, deployed
from azu.engine.reference import ModelShape, generate

_STREAMS = 16
_TIMEOUT_S = 300.0
_NUM_BLOCKS = 256


def measure(shape: ModelShape) -> tuple[Figure, ...]:
    """Return the speed of all streams together, prompts included, and how busy and how large stages were."""
    model = bench_model(shape)
    boundary = balanced_boundary(model.structure, NEW_TOKENS / (PROMPT_TOKENS + NEW_TOKENS))
    prompts = random_prompts(model.structure, _STREAMS, PROMPT_TOKENS)
    runs: dict[int | None, Run] = {}
    with ray_here():
        for micro_batches in (None, 1):
            stages = (0, boundary, shape.num_layers)
            with deployed(model, stages, _NUM_BLOCKS, micro_batches) as deployment:
                runs[micro_batches] = deployment.run([Request(prompt, NEW_TOKENS) for prompt in prompts])
                memory = deployment.memory()
    overlapped, in_turns = runs[None], runs[1]
    whole, tokens = call_apart(_TIMEOUT_S, generate, model.source, prompts, NEW_TOKENS, num_threads=2)
    equal = sum(
        list(answer.token_ids) == expected
        for answer, expected in zip(overlapped.answers, tokens, strict=True)
    )
    last_first_token = max(answer.seconds[0] for answer in overlapped.answers)
    return (
        Figure(
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
        Figure(
            name="16 streams, 2 micro-batches",
            unit="tokens/s",
            value=overlapped.tokens_per_s,
            reference=in_turns.tokens_per_s,
            reference_name="the same stages, 1 micro-batch",
        ),
        *(
            Figure(
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
