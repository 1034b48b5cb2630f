"""What a plan promises is what a process takes: measured, not estimated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from azu.units import MIB

pytestmark = pytest.mark.prove


def test_fifty_jobs_at_once_stay_within_the_memory_that_was_planned(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.planner.measured_memory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
    shown = json.loads(done.stdout.splitlines()[-1])

    assert shown["jobs"] == 50
    assert shown["tokens"] == shown["expected_tokens"], "no job was cut short for lack of room"
    assert shown["peak_bytes"] <= shown["planned_bytes"]
    print(
        f"50 jobs: planned {shown['planned_bytes'] / MIB:.0f} MiB, "
        f"loaded {shown['loaded_bytes'] / MIB:.0f} MiB, "
        f"peak {shown['peak_bytes'] / MIB:.0f} MiB, {shown['tokens']} tokens"
    )
