"""A process whose steps allocate the same memory again keeps it, and returns it to the system on request."""

import json
import subprocess
import sys

import pytest

# In a process of its own, because the settings cannot be undone. A step allocates a few buffers of some MiB.
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_steps_cause_few_page_faults_when_memory_is_kept() -> None:
    by_itself, kept = measured(), measured("keep")

    assert kept["faults"] < by_itself["faults"] / 10
    assert kept["given_back_bytes"] > 190 * 2**20
