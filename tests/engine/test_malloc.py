"""A process whose steps allocate the same again and again keeps that memory, and gives it back when asked."""

import json
import subprocess
import sys

import pytest

# In a process of its own: what is set stays set. A step is what a stage's is: a few buffers of some MiB.
_STEPS = """
import json, resource, sys
from azu.engine.malloc import give_back, keep_between_steps
from azu.units import MIB

def faults(step):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def step():
    parts = [bytearray(5 * MIB) for _ in range(8)]

if "keep" in sys.argv:
    keep_between_steps()
for _ in range(3):
    step()
found = {"faults": faults(lambda: [step() for _ in range(10)])}
pool = [bytearray(MIB) for _ in range(200)]
last = bytearray(MIB)
pool.clear()
before = resident()
give_back("cpu")
found["given_back_bytes"] = before - resident()
print(json.dumps(found))
"""


def measured(*arguments: str) -> dict[str, int]:
    command = [sys.executable, "-c", _STEPS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_steps_do_not_fault_their_memory_in_anew() -> None:
    by_itself, kept = measured(), measured("keep")

    assert kept["faults"] < by_itself["faults"] / 10
    assert kept["given_back_bytes"] > 190 * 2**20
