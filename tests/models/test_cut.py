"""A cut writes each tensor once, refuses bad values, and is resumed after a kill."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from azu.errors import BrokenCheckpoint, Conflict
from azu.models import describe
from azu.models.cut import JOURNAL_FILE, all_finite, cast, cut
from azu.protocol.structure import STRUCTURE_FILE, Structure
from tests.models.checkpoints import (
    FAMILIES,
    MODEL_ID,
    REVISION,
    change_config,
    cut_checkpoint,
    load_checkpoint,
    reassemble,
    save_checkpoint,
    store_checkpoint,
)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"], ids=["single", "indexed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_hold_every_tensor_of_the_checkpoint(tmp_path, family, shard_size):
    source = save_checkpoint(tmp_path / "source", family, shard_size=shard_size)
    structure = cut_checkpoint(source, tmp_path / "out")
    assert_equal(reassemble(tmp_path / "out", structure), load_checkpoint(source))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_copied_bit_by_bit(tmp_path, dtype):
    source = save_checkpoint(tmp_path / "source", "qwen2_moe", dtype=dtype)
    structure = cut_checkpoint(source, tmp_path / "out")
    assert structure.dtype == str(dtype).removeprefix("torch.")
    assert_equal(reassemble(tmp_path / "out", structure), load_checkpoint(source))


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.float16])
def test_weights_are_cast_to_the_serving_dtype(tmp_path, stored):
    source = save_checkpoint(tmp_path / "source", "llama")
    original = {name: tensor.to(stored) for name, tensor in load_checkpoint(source).items()}
    store_checkpoint(source, original)
    change_config(source, dtype="bfloat16")
    structure = cut_checkpoint(source, tmp_path / "out")
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in original.items()}
    assert_equal(reassemble(tmp_path / "out", structure), expected)
    assert {info.dtype for shard in structure.shards for info in shard.tensors.values()} == {"bfloat16"}


def test_parameters_that_transformers_keeps_in_float32_are_not_cast(tmp_path):
    source = save_checkpoint(tmp_path / "source", "deepseek_v3")
    change_config(source, dtype="bfloat16")
    structure = cut_checkpoint(source, tmp_path / "out")
    bias = structure.layer_shard(1).tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == "float32"
    assert structure.layer_shard(1).tensors["model.layers.1.mlp.gate.weight"].dtype == "bfloat16"


def test_the_structure_agrees_with_the_files(tmp_path):
    source = save_checkpoint(tmp_path / "source", "qwen2_moe")
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    structure = cut_checkpoint(source, tmp_path / "out")
    assert Structure.from_json((tmp_path / "out" / STRUCTURE_FILE).read_bytes()) == structure
    for item in (*structure.shards, *structure.files):
        name = getattr(item, "file_name", None) or item.name
        content = (tmp_path / "out" / name).read_bytes()
        assert len(content) == item.size_bytes
        assert hashlib.sha256(content).hexdigest() == item.sha256
    for shard in structure.shards:
        tensors = load_file(tmp_path / "out" / shard.file_name)
        assert {name: (info.dtype, info.shape) for name, info in shard.tensors.items()} == {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in tensors.items()
        }
        assert shard.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert {file.name for file in structure.files} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    }
    assert not list((tmp_path / "out").glob("*.py"))


def test_every_tensor_of_a_mapped_shard_is_aligned(tmp_path):
    source = save_checkpoint(tmp_path / "source", "deepseek_v3")
    change_config(source, dtype="bfloat16")
    structure = cut_checkpoint(source, tmp_path / "out")
    for shard in structure.shards:
        content = (tmp_path / "out" / shard.file_name).read_bytes()
        assert (int.from_bytes(content[:8], "little") + 8) % 64 == 0
        for tensor in load_file(tmp_path / "out" / shard.file_name).values():
            assert tensor.data_ptr() % tensor.element_size() == 0


def test_cutting_twice_gives_the_same_bytes(tmp_path):
    source = save_checkpoint(tmp_path / "source", "gpt_oss")
    assert cut_checkpoint(source, tmp_path / "one") == cut_checkpoint(source, tmp_path / "two")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_value_that_is_not_finite_is_refused_with_its_file_and_tensor(tmp_path, dtype, value):
    source = save_checkpoint(tmp_path / "source", "llama", dtype=dtype)
    tensors = load_checkpoint(source)
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = value
    store_checkpoint(source, tensors)
    with pytest.raises(
        BrokenCheckpoint, match=r"model\.safetensors: 'model\.layers\.1\.mlp\.up_proj\.weight'"
    ):
        cut_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out" / STRUCTURE_FILE).exists()
    assert not (tmp_path / "out" / "layer_1_dense.safetensors").exists()
    assert not list((tmp_path / "out").glob("*.part"))


def test_a_value_too_large_for_the_serving_dtype_is_refused(tmp_path):
    source = save_checkpoint(tmp_path / "source", "llama")
    tensors = load_checkpoint(source)
    tensors["model.norm.weight"][3] = 1e6
    store_checkpoint(source, tensors)
    change_config(source, dtype="float16")
    with pytest.raises(BrokenCheckpoint, match="not finite in float16"):
        cut_checkpoint(source, tmp_path / "out")


def test_a_damaged_shard_is_written_again_and_the_others_are_kept(tmp_path):
    source, out = save_checkpoint(tmp_path / "source", "llama"), tmp_path / "out"
    structure = cut_checkpoint(source, out)
    kept = (out / "layer_0_dense.safetensors").stat()
    damaged = out / "layer_1_dense.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    (out / "head.safetensors").unlink()
    assert cut_checkpoint(source, out) == structure
    assert_equal(reassemble(out, structure), load_checkpoint(source))
    assert (out / "layer_0_dense.safetensors").stat().st_mtime_ns == kept.st_mtime_ns


def test_a_folder_with_shards_of_another_model_is_not_changed(tmp_path):
    source, out = save_checkpoint(tmp_path / "source", "llama"), tmp_path / "out"
    cut_checkpoint(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    with pytest.raises(Conflict, match=MODEL_ID):
        cut(source, out, model_id="test/other", revision=REVISION, architecture=describe(source))
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before


def test_shards_of_a_checkpoint_that_has_changed_are_not_reused(tmp_path):
    source, out = save_checkpoint(tmp_path / "source", "llama"), tmp_path / "out"
    good = load_checkpoint(source)
    broken = {name: tensor.clone() for name, tensor in good.items()}
    broken["lm_head.weight"][0, 0] = float("nan")
    store_checkpoint(source, broken)
    with pytest.raises(BrokenCheckpoint):
        cut_checkpoint(source, out)
    assert (out / "layer_0_dense.safetensors").exists()
    changed = {name: tensor + 1 for name, tensor in good.items()}
    store_checkpoint(source, changed)
    assert_equal(reassemble(out, cut_checkpoint(source, out)), changed)


def test_progress_ends_at_the_total(tmp_path):
    source = save_checkpoint(tmp_path / "source", "qwen2_moe")
    for _ in ("cut", "verified"):
        reports: list[tuple[int, int]] = []
        structure = cut(
            source,
            tmp_path / "out",
            model_id=MODEL_ID,
            revision=REVISION,
            architecture=describe(source),
            progress=lambda done, total, reports=reports: reports.append((done, total)),
        )
        total = sum(shard.weight_bytes for shard in structure.shards)
        assert reports[-1] == (total, total)
        assert [done for done, _ in reports] == sorted(done for done, _ in reports)


_SLOW_CUT = """
import sys, time
from pathlib import Path
from azu.models import describe
from azu.models.cut import cut
source, out = map(Path, sys.argv[1:])
def progress(done, total):
    print(done, flush=True)
    time.sleep(0.05)
cut(source, out, model_id="test/model", revision="0" * 40, architecture=describe(source), progress=progress)
"""


@pytest.mark.prove
def test_a_killed_cut_leaves_no_incomplete_shard_and_is_resumed(tmp_path):
    source, out = save_checkpoint(tmp_path / "source", "qwen2_moe", hidden_size=256), tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", _SLOW_CUT, source, out], stdout=subprocess.PIPE) as process:
        for _ in range(9):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not (out / STRUCTURE_FILE).exists()
    for path in out.glob("*.safetensors"):
        load_file(path)
    names = (json.loads(line)["name"] for line in (out / JOURNAL_FILE).read_text().splitlines()[1:])
    finished = {name: (out / f"{name}.safetensors").stat().st_mtime_ns for name in names}
    assert finished
    structure = cut_checkpoint(source, out)
    assert_equal(reassemble(out, structure), load_checkpoint(source))
    assert {name: (out / f"{name}.safetensors").stat().st_mtime_ns for name in finished} == finished
    assert not list(out.glob(".*.part"))


def test_a_second_cut_into_the_same_folder_waits_for_the_first(tmp_path):
    source, out = save_checkpoint(tmp_path / "source", "llama"), tmp_path / "out"
    started, go_on = threading.Event(), threading.Event()

    def pause(done: int, total: int) -> None:
        started.set()
        assert go_on.wait(30)

    architecture = describe(source)
    ids = {"model_id": MODEL_ID, "revision": REVISION, "architecture": architecture}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cut, source, out, **ids, progress=pause)
        assert started.wait(30)
        second = pool.submit(cut, source, out, **ids)
        assert not wait([second], timeout=0.5).done
        go_on.set()
        assert first.result(30) == second.result(30)
    assert_equal(reassemble(out, first.result()), load_checkpoint(source))


def test_leftovers_of_a_killed_cut_are_removed(tmp_path):
    source, out = save_checkpoint(tmp_path / "source", "llama"), tmp_path / "out"
    out.mkdir()
    (out / ".layer_9_dense.safetensors.part").write_bytes(b"half")
    cut_checkpoint(source, out)
    assert not list(out.glob(".*.part"))
    assert os.listdir(out).count(STRUCTURE_FILE) == 1


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


def raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(bytearray(tensor.contiguous().view(torch.uint8).numpy().tobytes()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_each_16_bit_pattern_is_finite_where_torch_says_so(dtype):
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    name = str(dtype).removeprefix("torch.")
    content = raw(patterns)
    found = [all_finite(content[start : start + 2], name) for start in range(0, len(content), 2)]
    assert found == torch.isfinite(patterns).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@given(st.lists(st.floats(width=16), max_size=20))
def test_one_bad_value_anywhere_is_found(dtype, values):
    tensor = torch.tensor(values, dtype=dtype)
    assert all_finite(raw(tensor), str(dtype).removeprefix("torch.")) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_the_largest_values_are_finite(dtype):
    largest = torch.finfo(dtype).max
    name = str(dtype).removeprefix("torch.")
    assert all_finite(raw(torch.tensor([largest, -largest, 0.0, -0.0], dtype=dtype)), name)
    assert not all_finite(raw(torch.tensor([1.0, -float("inf")], dtype=dtype)), name)
    assert not all_finite(raw(-torch.tensor([1.0, float("nan")], dtype=dtype)), name)


@pytest.mark.parametrize("target", DTYPES, ids=NAMES)
@pytest.mark.parametrize("source", DTYPES, ids=NAMES)
def test_casts_agree_with_torch(source, target):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(source)
    found = cast(raw(values), str(source).removeprefix("torch."), str(target).removeprefix("torch."))
    assert bytes(found) == bytes(raw(values.to(target)))
