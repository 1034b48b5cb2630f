"""The memory that a cut needs, on checkpoints larger than that."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from azu.models.config_json import read_config
from azu.models.skeleton import build_skeleton
from azu.protocol.structure import STRUCTURE_FILE, Structure
from azu.units import MIB

pytestmark = pytest.mark.prove

_CUT = """
import sys, threading
from pathlib import Path
from azu.models import describe
from azu.models.cut import cut
def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
peak, over = 0, threading.Event()
def watch():
    global peak
    while not over.wait(0.005):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
source, out = map(Path, sys.argv[1:])
architecture = describe(source)
cut(source, out, model_id="test/model", revision="0" * 40, architecture=architecture)
over.set()
watcher.join()
print(peak)
"""


def large_checkpoint(folder: Path, family: str, stored: str, **sizes: object) -> Path:
    """Write a checkpoint of gigabytes of zeros as a sparse file, without building the model."""
    config = AutoConfig.for_model(
        family,
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2048,
        num_attention_heads=16,
        num_key_value_heads=4,
        dtype="bfloat16",
        **sizes,
    )
    config.save_pretrained(folder)
    width = {"F32": 4, "BF16": 2}[stored]
    header, offset = {}, 0
    for name, tensor in build_skeleton(read_config(folder)).state_dict().items():
        end = offset + math.prod(tensor.shape) * width
        header[name] = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + offset)
    return folder


def peak_of_cut(source: Path, out: Path) -> int:
    """Cut in another process; return its largest anonymous memory in bytes."""
    return int(subprocess.check_output([sys.executable, "-c", _CUT, source, out], text=True, timeout=600))


@pytest.mark.parametrize(
    ("family", "stored", "sizes"),
    [
        (
            "gpt_oss",
            "BF16",
            {"num_hidden_layers": 3, "num_local_experts": 32, "num_experts_per_tok": 4, "head_dim": 64},
        ),
        ("llama", "F32", {"num_hidden_layers": 24}),
    ],
    ids=["fused experts", "cast"],
)
def test_a_cut_needs_one_output_file_and_300_mib_at_most(tmp_path, family, stored, sizes):
    source = large_checkpoint(tmp_path / "source", family, stored, **sizes)
    peak = peak_of_cut(source, tmp_path / "out")
    structure = Structure.from_json((tmp_path / "out" / STRUCTURE_FILE).read_bytes())
    limit = max(shard.size_bytes for shard in structure.shards) + 300 * MIB
    assert (source / "model.safetensors").stat().st_size > 2 * limit
    print(f"{family}: peak {peak / MIB:.0f} MiB, limit {limit / MIB:.0f} MiB")
    assert peak < limit
    shutil.rmtree(tmp_path)
