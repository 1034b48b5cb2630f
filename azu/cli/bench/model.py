"""The bench model: random weights, made once in the temporary folder, cut by azu's own sharding."""

import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from azu.architecture import describe
from azu.cli.bench.apart import call_apart
from azu.engine.reference import ModelShape, write_random_model
from azu.protocol.structure import Structure
from azu.sharding.cut import cut

_SEED = 7
_MAKING_TIMEOUT_S = 300.0
_MODEL_ID = "azu/bench"


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model's folder and its shards."""

    source: Path
    shards: Path
    structure: Structure


def bench_model(shape: ModelShape, root: Path | None = None) -> BenchModel:
    """Return the model of a shape, making and cutting it unless an earlier run did."""
    root = root or Path(tempfile.gettempdir()) / "azu-bench"
    sizes = (shape.num_layers, shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.mlp_size)
    folder = root / "-".join(str(size) for size in (*sizes, shape.vocab_size, shape.context_length))
    source, shards = folder / "model", folder / "shards"
    if not source.exists():
        # Whoever is interrupted leaves a folder of another name.
        half_made = folder / "half-made"
        shutil.rmtree(half_made, ignore_errors=True)
        half_made.mkdir(parents=True)
        call_apart(_MAKING_TIMEOUT_S, write_random_model, half_made, shape)
        half_made.rename(source)
    structure = cut(source, shards, model_id=_MODEL_ID, revision="bench", architecture=describe(source))
    return BenchModel(source, shards, structure)


def random_prompts(structure: Structure, number: int, length: int) -> list[tuple[int, ...]]:
    """Return prompts of made-up tokens; the same ones every time."""
    chance = random.Random(_SEED)  # noqa: S311 - tokens to compute with, no secret
    return [tuple(chance.randrange(structure.vocab_size) for _ in range(length)) for _ in range(number)]


def balanced_boundary(structure: Structure, sampled_share: float = 1.0) -> int:
    """Return the layer at which two stages of equal machines share the work.

    The head, on the last stage, works for the share of a run's tokens that another is sampled from.
    """
    layers = [structure.layer_shard(layer.index).active_parameters for layer in structure.layers]
    whole = sum(layers) + sampled_share * structure.shard("head").active_parameters
    return min(range(1, len(layers)), key=lambda boundary: abs(2 * sum(layers[:boundary]) - whole))
