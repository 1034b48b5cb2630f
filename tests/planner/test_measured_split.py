"""On real processes of different speed, a plan gives the slower node fewer layers; times are printed."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from statistics import median

import psutil
import pytest

from azu.bench.model import BenchModel, ModelShape, bench_model, random_prompts
from azu.bench.report import ray_here
from azu.bench.streams import Request, deployed
from azu.bench.suite import RAY_ENVIRONMENT
from azu.launch.processes import variables_set
from azu.planner.demand import MemoryDemand
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.protocol.topology import LayerSpan
from tests.builders import node
from tests.network.actors import pid_of

pytestmark = [
    pytest.mark.prove,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two nodes need a core each"),
]

POLICY = PlanPolicy(promised_sequences=1, tokens_per_sequence=256, batch_size=1)
# The number of the model's 24 layers that each node has room for.
MOST_LAYERS = 18
NUM_TOKENS = 32
# Each node has a core, which it shares with this number of busy processes.
NETWORKS: tuple[Mapping[str, int], ...] = ({"ada": 0, "ben": 1}, {"ada": 2, "ben": 0})
_SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
# A node uses its best measurement, as if no other program ran. Here others always run: the mean counts.
_SPEED = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
from azu.engine import device

def mean_s(work):
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() < started + 1.5:
        work()
        rounds += 1
    return (time.perf_counter() - started) / rounds

device._best_s = mean_s
found = device._cpu_speed()
print(found.memory_bytes_per_s, found.flops_per_s)
"""


@contextmanager
def busy(cores: Sequence[int]) -> Iterator[None]:
    """Run one busy process for each core in the list."""
    with ExitStack() as stack:
        for core in cores:
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", _SPIN, str(core)]))
            stack.callback(process.kill)
        yield


def speed_of(core: int) -> dict[str, float]:
    """Measure the part of a core that one more process gets."""
    command = [sys.executable, "-c", _SPEED, str(core)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    memory, flops = done.stdout.split()
    return {"memory_bytes_per_s": float(memory), "flops_per_s": float(flops)}


def time_per_token_s(model: BenchModel, boundaries: Sequence[int], cores: Sequence[int]) -> float:
    """Run one stream over stages between the boundaries, each on its core; return the median of its steps."""
    with deployed(model, boundaries, num_blocks=16) as deployment:
        for stage, core in zip(deployment.stages, cores, strict=True):
            for thread in psutil.Process(pid_of(stage)).threads():
                os.sched_setaffinity(thread.id, {core})
        (prompt,) = random_prompts(model.structure, 1, 16)
        (answer,) = deployment.run([Request(prompt, NUM_TOKENS)]).answers
    return median(after - before for before, after in pairwise(answer.seconds))


@pytest.mark.parametrize("others", NETWORKS, ids=str)
def test_a_busy_node_gets_fewer_layers_on_real_processes(others: Mapping[str, int]) -> None:
    model = bench_model(ModelShape())
    structure, core_of = model.structure, {name: core for core, name in enumerate(others)}
    demand = MemoryDemand.of(structure, POLICY)
    ends = ((0, MOST_LAYERS), (structure.num_layers - MOST_LAYERS, structure.num_layers))
    room = max(demand.stage_vram_bytes(LayerSpan(*span), {}) for span in ends)

    with (
        variables_set(RAY_ENVIRONMENT),
        busy([core_of[name] for name in others for _ in range(others[name])]),
    ):
        nodes = [node(name, room, **speed_of(core_of[name])) for name in others]
        planned = plan(structure, nodes, POLICY).stages
        half = structure.num_layers // 2
        with ray_here():
            equal_s = time_per_token_s(model, (0, half, structure.num_layers), [*core_of.values()])
            planned_s = time_per_token_s(
                model,
                (0, *(stage.span.end for stage in planned)),
                [core_of[stage.node_id] for stage in planned],
            )

    layers = {stage.node_id: len(stage.span) for stage in planned}
    print(f"{others}: {layers}, {1e3 * planned_s:.0f} ms a token; equal parts {1e3 * equal_s:.0f} ms")
    busy_node, idle_node = sorted(others, key=lambda name: -others[name])
    assert layers.get(busy_node, 0) < layers[idle_node]
