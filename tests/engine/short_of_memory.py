"""A model in a process with less and less memory: `FOLDER` prints its answers as JSON.

The operating system sets the limit, so this needs a process of its own.
"""

import json
import logging
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from azu.engine.local import LocalPipeline, local_topology
from azu.engine.scheduler import SchedulerConfig
from azu.models import describe
from azu.models.cut import cut
from azu.protocol.sampling import SamplingParams
from azu.protocol.structure import STRUCTURE_FILE, Structure
from azu.units import KIB, MIB
from tests.engine.families import FAMILIES, build_lively

_NUM_BLOCKS = 256
# The room shrinks until a step runs out of memory.
_ROOMS_MIB = range(96, 0, -4)
_LARGE_BYTES = MIB // 2
_PROMPTS = [[(7 * index + place) % 89 + 3 for place in range(400)] for index in range(4)]
_SAMPLING = SamplingParams(max_tokens=6, ignore_eos=True)
# Few and narrow layers with wide activations: a step takes much more memory than the weights.
_CHANGES = {
    "hidden_size": 256,
    "intermediate_size": 8192,
    "moe_intermediate_size": 4096,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "max_position_embeddings": 1024,
    "layer_types": None,
}


def save_wide(family: str, folder: Path) -> Structure:
    """Save and cut a model whose steps take much more memory than its weights."""
    config = FAMILIES[family]().to_dict()
    config |= {name: value for name, value in _CHANGES.items() if name in config}
    build_lively(AutoConfig.for_model(**config)).save_pretrained(folder / "model")
    architecture = describe(folder / "model")
    return cut(folder / "model", folder, model_id=family, revision="r", architecture=architecture)


@contextmanager
def room(size_bytes: int) -> Iterator[None]:
    """Limit the process to `size_bytes` more memory; large free blocks of the heap are taken first."""
    status = Path("/proc/self/status").read_text().splitlines()
    taken = next(int(line.split()[1]) * KIB for line in status if line.startswith("VmSize"))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken, hard))
    try:
        held = list(_large_free())
        resource.setrlimit(resource.RLIMIT_AS, (taken + size_bytes, hard))
        yield
        del held
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _large_free() -> Iterator[Tensor]:
    """Yield the large free blocks; small ones stay free, because oneDNN ends a process without any."""
    with suppress(RuntimeError):  # torch raises it when there is no more
        while True:
            yield torch.empty(_LARGE_BYTES, dtype=torch.uint8)


class _Counted(logging.Handler):
    """Counts the engine's log lines about memory."""

    number = 0

    def emit(self, _: logging.LogRecord) -> None:
        self.number += 1


def main(folder: Path) -> None:
    """Answer with little memory, then with all of it."""
    logging.getLogger("azu.engine.out_of_memory").addHandler(counted := _Counted())
    structure = Structure.from_json((folder / STRUCTURE_FILE).read_bytes())
    holders = 2 if any(layer.num_experts for layer in structure.layers) else 0
    topology = local_topology(structure, (0, 1, 2), num_blocks=_NUM_BLOCKS, expert_holders=holders)
    scheduling = SchedulerConfig(_NUM_BLOCKS, topology.block_size, prefill_chunk_tokens=1024)
    pipeline = LocalPipeline(structure, topology, folder, scheduling)
    # A first run makes all that later runs reuse.
    pipeline.generate([[3, 4, 5]], _SAMPLING)
    short: list[list[int]] = []
    for room_mib in _ROOMS_MIB:
        if not counted.number:
            with room(room_mib * MIB):
                short = [one.token_ids for one in pipeline.generate(_PROMPTS, _SAMPLING)]
    shortages = counted.number
    whole = [one.token_ids for one in pipeline.generate(_PROMPTS, _SAMPLING)]
    print(json.dumps({"short": short, "whole": whole, "shortages": shortages}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
