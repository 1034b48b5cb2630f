"""A process of its own that loads a planned stage, runs 50 jobs at once in it and prints what it really took.

Usage: python -m tests.planner.measured_memory FOLDER. One JSON object: planned bytes, the bytes of anonymous
memory when the model was loaded and at the peak, beside those of the process before the model was there, and
how many tokens came out. Pages of mapped files are left out: the kernel takes them back when it needs them.
"""

import gc
import json
import random
import sys
import threading
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from azu.architecture import describe
from azu.engine.local import LocalPipeline
from azu.engine.scheduler import SchedulerConfig
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.protocol.sampling import SamplingParams
from azu.protocol.structure import Structure
from azu.protocol.topology import Topology
from azu.sharding.cut import cut
from azu.units import MIB
from tests.builders import node

VOCAB_SIZE = 8000
CONFIG = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=512,
    eos_token_id=2,
)
SMALL = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    eos_token_id=2,
)
CHUNK_TOKENS, MAX_RUNNING = 128, 32
POLICY = PlanPolicy(
    promised_sequences=8,
    tokens_per_sequence=256,
    activation_tokens=CHUNK_TOKENS + MAX_RUNNING,
    margin_bytes=16 * MIB,
)
NUM_JOBS = 50


_SAMPLE_S = 0.002


class Peak:
    """The most anonymous memory that this process has had, looked at all the time."""

    def __init__(self) -> None:
        self.most_bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not threading.Event().wait(_SAMPLE_S):
            self.most_bytes = max(self.most_bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """Return what this process holds now beside files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def load(config: LlamaConfig, folder: Path) -> tuple[Structure, Topology, Path]:
    """Make, cut and plan a model."""
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    shards, architecture = folder / "shards", describe(folder / "model")
    structure = cut(folder / "model", shards, model_id="measured", revision="r1", architecture=architecture)
    return structure, plan(structure, [node("a", 1024 * MIB)], POLICY), shards


def main(folder: Path) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    # What any model makes the libraries allocate for themselves is not this one's.
    structure, topology, shards = load(SMALL, folder / "small")
    LocalPipeline(structure, topology, shards).generate([[3, 4, 5]], SamplingParams(max_tokens=5))
    structure, topology, shards = load(CONFIG, folder / "large")
    (stage,) = topology.stages
    gc.collect()
    draw = random.Random(1)
    prompts = [[draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randint(20, 200))] for _ in range(NUM_JOBS)]
    sampling = [SamplingParams(max_tokens=draw.randint(20, 56), ignore_eos=True) for _ in prompts]

    before, peak = anonymous_bytes(), Peak()
    scheduling = SchedulerConfig(
        topology.num_blocks, topology.block_size, prefill_chunk_tokens=CHUNK_TOKENS, max_running=MAX_RUNNING
    )
    pipeline = LocalPipeline(structure, topology, shards, scheduling)
    loaded = anonymous_bytes() - before
    done = pipeline.generate(prompts, sampling)
    shown = {
        "planned_bytes": stage.vram_bytes,
        "loaded_bytes": loaded,
        "peak_bytes": peak.most_bytes - before,
        "jobs": len(done),
        "tokens": sum(len(one.token_ids) for one in done),
        "expected_tokens": sum(one.max_tokens for one in sampling),
    }
    sys.stdout.write(json.dumps(shown) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
