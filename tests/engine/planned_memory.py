"""Run fifty sequences on a stage with KV for four: `FOLDER` prints planned and taken bytes as JSON."""

import json
import sys
import threading
from pathlib import Path

import psutil

from azu.engine.local import LocalPipeline, local_topology
from azu.engine.malloc import keep_between_steps
from azu.planner.demand import MemoryDemand
from azu.planner.policy import PlanPolicy
from azu.protocol.sampling import SamplingParams
from azu.protocol.structure import STRUCTURE_FILE, Structure
from azu.protocol.topology import LayerSpan
from azu.units import MIB

NUM_SEQUENCES = 50
# A process on a CPU takes about 90 of it: the heap kept between steps, and code loaded by the first step.
MARGIN_MIB = 128
_POLICY = PlanPolicy(
    promised_sequences=4,
    tokens_per_sequence=128,
    activation_tokens=512 + 64,
    margin_bytes=MARGIN_MIB * MIB,
    margin_fraction=0.0,
)
_PERIOD_S = 0.05


def main(folder: Path) -> None:
    """Load, run, and measure the process's memory every 50 ms from before the load."""
    structure = Structure.from_json((folder / STRUCTURE_FILE).read_bytes())
    whole = LayerSpan(0, structure.num_layers)
    process = psutil.Process()
    before, most, ended = process.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(_PERIOD_S):
            most = max(most, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    topology = local_topology(structure, (whole.start, whole.end), num_blocks=_POLICY.num_blocks)
    pipeline = LocalPipeline(structure, topology, folder)
    keep_between_steps()
    prompts = [
        [(index + place) % 89 + 3 for place in range(4 + index * 7 % 90)] for index in range(NUM_SEQUENCES)
    ]
    sampling = SamplingParams(max_tokens=24, ignore_eos=True)
    done = pipeline.generate(prompts, sampling)
    ended.set()
    thread.join()
    planned = MemoryDemand.of(structure, _POLICY).stage_vram_bytes(whole, {})
    found = {
        "finished": sum(len(one.token_ids) == sampling.max_tokens for one in done),
        "preempted": pipeline.engine.num_preempted,
        "planned_bytes": planned,
        "taken_bytes": most - before,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
