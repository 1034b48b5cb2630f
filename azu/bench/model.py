"""The bench model: random weights, made once in the temporary folder, cut by azu's own sharding."""

import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from azu.bench.report import call_apart
from azu.models import describe
from azu.models.cut import cut
from azu.protocol.structure import Structure

_WEIGHTS_SEED = 1
# Small enough that no activation grows from layer to layer.
_DEVIATION = 0.02


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The size of a model with random weights, in float32."""

    num_layers: int = 24
    hidden_size: int = 896
    num_heads: int = 14
    num_kv_heads: int = 2
    mlp_size: int = 4864
    vocab_size: int = 32_000
    context_length: int = 4096


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When each step of a batch was done, in seconds since generation began; the first is the prefill's."""

    batch_size: int
    seconds: tuple[float, ...]

    @property
    def decode_tokens_per_s(self) -> float:
        """Speed between the first token and the last."""
        return self.batch_size * (len(self.seconds) - 1) / (self.seconds[-1] - self.seconds[0])

    @property
    def total_tokens_per_s(self) -> float:
        """Speed with the prefill."""
        return self.batch_size * len(self.seconds) / self.seconds[-1]


def write_random_model(folder: Path, shape: ModelShape) -> None:
    """Write a Llama of that shape as an ordinary Hugging Face folder; the same one every time."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(_WEIGHTS_SEED)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.context_length,
        initializer_range=_DEVIATION,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def generate(
    folder: Path, prompts: Sequence[Sequence[int]], new_tokens: int, num_threads: int
) -> tuple[StepTimes, list[list[int]]]:
    """Run prompts of one length as a static batch, greedily; return step times and the tokens.

    Run it in a process of its own: the number of threads is the process's.
    """
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(num_threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    inputs = torch.tensor([list(prompt) for prompt in prompts])
    clock = _Clock()
    with torch.inference_mode():
        # What is made at first use (pages of the mapped file, kernels) is not what is measured.
        model.generate(inputs[:1], max_new_tokens=2)
        clock.start()
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            stopping_criteria=[clock],
        )
    return StepTimes(len(prompts), tuple(clock.seconds)), out[:, inputs.shape[1] :].tolist()


class _Clock:
    """Notes the time of each step; as a stopping criterion it never stops anything."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started_s = 0.0

    def start(self) -> None:
        self._started_s = time.perf_counter()

    def __call__(self, input_ids: Tensor, _scores: object, **_: object) -> Tensor:
        self.seconds.append(time.perf_counter() - self._started_s)
        return torch.zeros(len(input_ids), dtype=torch.bool)


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
