"""A stage takes no more memory than was planned for it, with any number of sequences."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from azu.models import describe
from azu.models.cut import cut
from azu.units import MIB
from tests.engine.families import VOCAB_SIZE, build_lively
from tests.engine.planned_memory import NUM_SEQUENCES

pytestmark = pytest.mark.prove


def test_fifty_sequences_take_no_more_than_was_planned(tmp_path: Path) -> None:
    # 190 MB of weights: much more than the random changes of a process's memory.
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCAB_SIZE, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    build_lively(config).save_pretrained(tmp_path / "model")
    architecture = describe(tmp_path / "model")
    cut(tmp_path / "model", tmp_path, model_id="wide", revision="r", architecture=architecture)

    command = [sys.executable, "-m", "tests.engine.planned_memory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["finished"] == NUM_SEQUENCES
    assert found["preempted"] > 0, "the KV cache had room for all of them"
    assert found["taken_bytes"] <= found["planned_bytes"]
    print(f"planned {found['planned_bytes'] / MIB:.0f} MiB, took {found['taken_bytes'] / MIB:.0f} at most")
