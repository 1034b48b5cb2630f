"""A checkpoint's tensors are found by name; files that are not what they claim to be are refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from azu.errors import BrokenCheckpoint
from azu.models.checkpoint import (
    CHUNK_BYTES,
    INDEX_FILE,
    MAX_HEADER_BYTES,
    StoredTensor,
    contained_file,
    read_checkpoint,
    read_range,
    weight_files,
)

TENSORS = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one file, beside a secret that no checkpoint may read."""
    save_file(TENSORS, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def header_only(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def test_tensors_of_one_file_are_found_with_their_bytes(folder):
    tensors = read_checkpoint(folder)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        "a": ("float32", (2, 3)),
        "b": ("bfloat16", (4,)),
    }
    content = (folder / "model.safetensors").read_bytes()
    stored = tensors["a"]
    assert content[stored.offset :][: stored.size_bytes] == struct.pack("<6f", *range(6))


def test_tensors_of_an_indexed_checkpoint_are_found_in_their_files(folder):
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, folder / f"model-{name}.safetensors")
    index(folder, {"a": "model-a.safetensors", "b": "model-b.safetensors"})
    assert {name: tensor.file for name, tensor in read_checkpoint(folder).items()} == {
        "a": "model-a.safetensors",
        "b": "model-b.safetensors",
    }


@pytest.mark.parametrize(
    "target",
    [
        "../secret.safetensors",
        "/etc/hostname",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "a\\b.safetensors",
        "x\0.safetensors",
    ],
)
def test_an_index_that_points_outside_its_folder_is_refused(folder, target):
    index(folder, {"a": target})
    with pytest.raises(BrokenCheckpoint, match=INDEX_FILE):
        read_checkpoint(folder)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_weight_file_that_links_outside_its_folder_is_refused(folder, absolute):
    link = folder / "model-1.safetensors"
    link.symlink_to(folder.parent / "secret.safetensors" if absolute else Path("../secret.safetensors"))
    index(folder, {"a": link.name})
    with pytest.raises(BrokenCheckpoint, match=r"model-1\.safetensors is a link that leads outside"):
        read_checkpoint(folder)


def test_a_folder_may_be_reached_through_a_link(folder, tmp_path):
    (tmp_path / "alias").symlink_to(folder)
    assert read_checkpoint(tmp_path / "alias").keys() == TENSORS.keys()


def test_links_in_a_hub_snapshot_may_lead_only_to_its_blobs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(TENSORS, blobs / "abcd")
    save_file(TENSORS, tmp_path / "secret")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcd")
    assert read_checkpoint(snapshot).keys() == TENSORS.keys()
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../secret")
    with pytest.raises(BrokenCheckpoint, match="leads outside"):
        read_checkpoint(snapshot)


@pytest.mark.parametrize(
    "name", ["../model/model.safetensors", "/etc/hostname", "..", ".", "", "a/b", "a\0b"]
)
def test_only_plain_file_names_are_accepted(folder, name):
    with pytest.raises(BrokenCheckpoint):
        contained_file(folder, name)


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_refused_by_name(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors is truncated"):
        read_checkpoint(folder)


def test_a_file_with_more_bytes_than_in_its_header_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors"):
        read_checkpoint(folder)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_under_a_safetensors_name_is_refused(folder, new_format):
    torch.save(TENSORS, folder / "model.safetensors", _use_new_zipfile_serialization=new_format)
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors is a pickle"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [1 << 62, (1 << 62) + 8]},
        {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]},
        {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "all", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        "F32",
    ],
)
def test_a_header_that_contradicts_itself_is_refused(folder, entry):
    header = json.dumps({"a": entry}).encode()
    (folder / "model.safetensors").write_bytes(header_only(header, b"\0" * 8))
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors"):
        read_checkpoint(folder)


def test_tensors_that_overlap_are_refused(folder):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (folder / "model.safetensors").write_bytes(header_only(header, b"\0" * 8))
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors"):
        read_checkpoint(folder)


@pytest.mark.parametrize("header", [b"not json", b"[]", b"[" * 5000, b'{"a":' * 5000, b"\xff\xfe", b""])
def test_a_header_that_is_no_object_is_refused(folder, header):
    (folder / "model.safetensors").write_bytes(header_only(header))
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors"):
        read_checkpoint(folder)


def test_a_header_that_is_too_large_is_refused_unread(folder):
    with (folder / "model.safetensors").open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(4 * MAX_HEADER_BYTES)
    with pytest.raises(BrokenCheckpoint, match="header of"):
        read_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors"):
        read_checkpoint(folder)


def test_a_tensor_that_is_only_in_the_index_is_refused(folder):
    save_file(TENSORS, folder / "model-1.safetensors")
    index(folder, {"a": "model-1.safetensors", "c": "model-1.safetensors"})
    with pytest.raises(BrokenCheckpoint, match=r"model-1\.safetensors lacks the tensor 'c'"):
        read_checkpoint(folder)


def test_a_file_that_is_only_in_the_index_is_refused(folder):
    index(folder, {"a": "model-1.safetensors"})
    with pytest.raises(BrokenCheckpoint, match=r"model-1\.safetensors is missing"):
        read_checkpoint(folder)


def test_a_folder_with_the_name_of_a_weight_file_is_refused(folder):
    index(folder, {"a": "model-1.safetensors"})
    (folder / "model-1.safetensors").mkdir()
    with pytest.raises(BrokenCheckpoint, match=r"model-1\.safetensors is missing"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 9999]
)
def test_a_malformed_index_is_refused(folder, content):
    index(folder, {})
    (folder / INDEX_FILE).write_text(content)
    with pytest.raises(BrokenCheckpoint, match=INDEX_FILE):
        read_checkpoint(folder)


def test_checkpoints_without_safetensors_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BrokenCheckpoint, match=r"does not read its \.bin files"):
        read_checkpoint(folder)


def test_a_single_file_is_preferred_to_an_index_as_in_transformers():
    assert weight_files(Path("nowhere"), {"model.safetensors", INDEX_FILE}) == ("model.safetensors",)


def test_a_range_is_read_completely_and_a_shorter_file_is_an_error(tmp_path):
    path = tmp_path / "weights.safetensors"
    content = bytes(range(256)) * (CHUNK_BYTES // 100)
    path.write_bytes(content)
    tensor = StoredTensor("a", path.name, path, "float32", (), 0, len(content))
    assert b"".join(map(bytes, read_range(tensor, 3, len(content) - 3))) == content[3:]
    with pytest.raises(BrokenCheckpoint, match=r"weights\.safetensors became shorter"):
        list(read_range(tensor, 3, len(content)))
