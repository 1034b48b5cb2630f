"""How long a short prompt waits for its first token while long prompts are being read."""

from azu.cli.bench.cluster import ray_here
from azu.cli.bench.model import balanced_boundary, bench_model, random_prompts
from azu.cli.bench.results import Figure
from azu.cli.bench.stages import Request, deployed
from azu.engine.reference import ModelShape
from azu.engine.scheduler import SchedulerConfig

_SHORT_TOKENS = 16
_LONG_TOKENS = 1024
_LONG_PROMPTS = 8
# The long prompts are well under way by then, and far from done.
_ARRIVES_AFTER_S = 3.0
_NUM_BLOCKS = 640


def measure(shape: ModelShape) -> tuple[Figure, ...]:
    """Return the short prompt's wait, held against three times its lone wait and one chunk; and memory."""
    model = bench_model(shape)
    boundary = balanced_boundary(model.structure, sampled_share=0.0)
    short = random_prompts(model.structure, 1, _SHORT_TOKENS)[0]
    *long, chunk = random_prompts(model.structure, _LONG_PROMPTS + 1, _LONG_TOKENS)
    chunk = chunk[: SchedulerConfig(1, 1).prefill_chunk_tokens]
    with ray_here(), deployed(model, (0, boundary, shape.num_layers), _NUM_BLOCKS) as deployment:
        lone_s = deployment.run([Request(short, 1)]).answers[0].seconds[0]
        alone = deployment.run([Request(chunk, 1)])
        # In the crowd a chunk is one step; alone it is cut so that the stages overlap.
        chunk_s = sum(alone.busy) * alone.seconds
        crowd = [Request(prompt, 1) for prompt in long]
        run = deployment.run([*crowd, Request(short, 1, after_s=_ARRIVES_AFTER_S)])
        memory = deployment.memory()
    return (
        Figure(
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
