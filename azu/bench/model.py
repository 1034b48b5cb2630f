"""The bench model: random weights, made once in the temporary folder, cut by azu's own sharding."""

import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from azu.bench.report import call_apart
from azu.models import describe
from azu.models.cut import cut
from azu.models.description import Architecture
from azu.protocol.structure import Structure

_WEIGHTS_SEED, _PROMPTS_SEED = 1, 7
# Small enough that no activation grows from layer to layer.
_DEVIATION = 0.02
_MAKING_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The size of a Llama with random weights in float32; the names are LlamaConfig's."""

    num_hidden_layers: int = 24
    hidden_size: int = 896
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    intermediate_size: int = 4864
    vocab_size: int = 32_000
    max_position_embeddings: int = 4096


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model's folder and its shards."""

    source: Path
    shards: Path
    structure: Structure


@dataclass(frozen=True, slots=True)
class StreamTiming:
    """The tokens of a request, and when each was known, in seconds since the request came."""

    token_ids: list[int]
    seconds: list[float]


@dataclass(frozen=True, slots=True)
class Run:
    """The result of a run of requests. `busy` is the share of the run that each stage computed."""

    answers: Sequence[StreamTiming]
    seconds: float
    busy: tuple[float, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens over the whole run's time."""
        return sum(len(answer.token_ids) for answer in self.answers) / self.seconds

    @property
    def decode_tokens_per_s(self) -> float:
        """Speed from when every stream has its first token until the first stream ends."""
        first, last = self.all_read_s, min(answer.seconds[-1] for answer in self.answers)
        return sum(first < at <= last for answer in self.answers for at in answer.seconds) / (last - first)

    @property
    def all_read_s(self) -> float:
        """When every stream has its first token."""
        return max(answer.seconds[0] for answer in self.answers)


def bench_model(shape: ModelShape) -> BenchModel:
    """Return the model of a shape; it is made and cut unless an earlier run did that."""
    folder = Path(tempfile.gettempdir()) / "azu-bench" / "-".join(map(str, astuple(shape)))
    source, shards = folder / "model", folder / "shards"
    if not source.exists():
        # An interrupted run leaves only a folder of this name.
        half_made = folder / "half-made"
        shutil.rmtree(half_made, ignore_errors=True)
        half_made.mkdir(parents=True)
        call_apart(_MAKING_TIMEOUT_S, write_random_model, half_made, shape)
        half_made.rename(source)
    return BenchModel(source, shards, cut_model(source, shards, describe(source)))


def cut_model(source: Path, shards: Path, architecture: Architecture) -> Structure:
    """Cut a model's folder into shards."""
    return cut(source, shards, model_id="azu/bench", revision="bench", architecture=architecture)


def write_random_model(folder: Path, shape: ModelShape) -> None:
    """Write a Llama of that shape as an ordinary Hugging Face folder; the same one every time."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(_WEIGHTS_SEED)
    config = LlamaConfig(**asdict(shape), initializer_range=_DEVIATION, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)


def random_prompts(structure: Structure, number: int, length: int) -> list[tuple[int, ...]]:
    """Return prompts of random tokens; the same ones every time."""
    chance = random.Random(_PROMPTS_SEED)  # noqa: S311 - tokens to compute with, no secret
    return [tuple(chance.randrange(structure.vocab_size) for _ in range(length)) for _ in range(number)]


def balanced_boundary(structure: Structure, sampled_share: float = 1.0) -> int:
    """Return the layer at which two stages of equal machines share the work.

    The head, on the last stage, works for the share of a run's tokens that another is sampled from.
    """
    layers = [structure.layer_shard(layer.index).active_parameters for layer in structure.layers]
    whole = sum(layers) + sampled_share * structure.shard("head").active_parameters
    return min(range(1, len(layers)), key=lambda boundary: abs(2 * sum(layers[:boundary]) - whole))


def run_transformers(
    model: BenchModel, prompts: Sequence[Sequence[int]], new_tokens: int, threads: int
) -> Run:
    """Have transformers continue prompts of one length as a batch, greedily.

    Run it in a process of its own: the number of threads is the process's.
    """
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    llama = AutoModelForCausalLM.from_pretrained(
        model.source, dtype=torch.float32, local_files_only=True
    ).eval()
    llama.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    inputs = torch.tensor([list(prompt) for prompt in prompts])
    times: list[float] = []

    def note_time(input_ids: Tensor, _scores: object, **_: object) -> Tensor:
        times.append(time.perf_counter() - started)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    with torch.inference_mode():
        # What is made at first use (pages of the mapped file, kernels) is not measured.
        llama.generate(inputs[:1], max_new_tokens=2)
        started = time.perf_counter()
        found = llama.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            stopping_criteria=[note_time],
        )
    new = found[:, inputs.shape[1] :].tolist()
    return Run([StreamTiming(token_ids, times) for token_ids in new], times[-1])
