"""One stream over two stages of one thread each, beside transformers' generate with one thread."""

from azu.cli.bench.apart import call_apart
from azu.cli.bench.cluster import ray_here
from azu.cli.bench.model import balanced_boundary, bench_model, random_prompts
from azu.cli.bench.results import Figure
from azu.cli.bench.stages import Answer, Request, deployed
from azu.engine.reference import ModelShape, generate

PROMPT_TOKENS = 128
NEW_TOKENS = 64
_TIMEOUT_S = 300.0
_NUM_BLOCKS = 32


def measure(shape: ModelShape) -> tuple[Figure, ...]:
    """Return the speed of decoding."""
    model = bench_model(shape)
    boundary = balanced_boundary(model.structure)
    prompts = random_prompts(model.structure, 1, PROMPT_TOKENS)
    with ray_here(), deployed(model, (0, boundary, shape.num_layers), _NUM_BLOCKS) as deployment:
        run = deployment.run([Request(prompts[0], NEW_TOKENS)])
    whole, tokens = call_apart(_TIMEOUT_S, generate, model.source, prompts, NEW_TOKENS, num_threads=1)
    (answer,) = run.answers
    return (
        Figure(
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


def decode_tokens_per_s(answer: Answer) -> float:
    """Return a stream's speed between its first token and its last."""
    return (len(answer.seconds) - 1) / (answer.seconds[-1] - answer.seconds[0])
