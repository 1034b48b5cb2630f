"""A stage that runs out of memory inside a step runs it in parts, and its answers stay the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from azu.engine.out_of_memory import StepPart, run_in_parts
from azu.errors import WorkerLost
from azu.protocol.step import Slice
from tests.engine.short_of_memory import save_wide


@pytest.mark.prove
@pytest.mark.parametrize("family", ["llama", "bloom", "qwen3_moe"])
def test_answers_are_the_same_when_memory_runs_out_inside_steps(family: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.engine.short_of_memory", str(tmp_path)]
    save_wide(family, tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["shortages"] > 0, "memory never ran out"
    assert found["short"] == found["whole"]
    print(f"{family}: out of memory {found['shortages']} times, answers identical")


def step_part(*num_tokens: int) -> StepPart:
    slices = tuple(Slice(index, 3, number, (0,), sample=True) for index, number in enumerate(num_tokens))
    return StepPart(slices, torch.arange(sum(num_tokens)))


def test_a_step_is_halved_by_slices_and_then_by_tokens() -> None:
    def run(part: StepPart) -> list[tuple[int, int, int, bool, list[int]]]:
        if len(part.rows) > 2:
            raise MemoryError
        return [
            (one.sequence_id, one.position, one.num_tokens, one.sample, part.rows.tolist())
            for one in part.slices
        ]

    ran = run_in_parts(run, step_part(1, 4), StepPart.halves, "cpu")

    assert [part for parts in ran for part in parts] == [
        (0, 3, 1, True, [0]),
        (1, 3, 2, False, [1, 2]),
        (1, 5, 2, True, [3, 4]),
    ]


def test_a_single_token_without_memory_raises_worker_lost_and_other_errors_are_not_retried() -> None:
    def never(_: StepPart) -> None:
        raise MemoryError

    def wrong(_: StepPart) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(WorkerLost, match="no memory left"):
        run_in_parts(never, step_part(1, 4), StepPart.halves, "cpu")
    with pytest.raises(RuntimeError, match="shapes"):
        run_in_parts(wrong, step_part(1, 4), StepPart.halves, "cpu")
