"""Read where each tensor of a checkpoint folder is stored; refuse files that are not what they claim."""

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from azu.errors import BrokenCheckpoint, plain_fault, plain_reason

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
# These files travel with the shards: a stage is built and prompts are tokenised from them. None is code.
MODEL_FILES = (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
# The keys are torch's names of the dtypes that a checkpoint may hold, the values safetensors' codes.
DTYPE_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "bool": "BOOL",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
# A chunk of this size stays in the processor's cache while it is checked, hashed and written.
CHUNK_BYTES = 1024 * 1024
MAX_HEADER_BYTES = 32 * 1024 * 1024
_HEADER_LENGTH_BYTES = 8
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".safetensors"}
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's bytes in a checkpoint file; `offset` counts from the file's start.

    `file` is the file's name in the checkpoint, `path` its real path. `dtype` is torch's name, or
    safetensors' own code for a dtype that azu does not serve.
    """

    name: str
    file: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class _Index(BaseModel):
    """model.safetensors.index.json; its other keys are ignored."""

    weight_map: dict[str, str]


def contained_file(folder: Path, name: str) -> Path:
    """Return the real path of a file in a checkpoint folder.

    A snapshot in the Hub's cache links to the `blobs` folder beside `snapshots`; a link to any other place
    outside the folder is refused. Raises BrokenCheckpoint when the file is missing or lies elsewhere.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise BrokenCheckpoint(f"{name!r} points outside the checkpoint's folder")
    home = folder.resolve()
    try:
        path = (home / name).resolve()
    except (OSError, RuntimeError) as error:
        raise BrokenCheckpoint(f"{name} is a link that leads nowhere") from error
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if path.parent not in (home, blobs):
        raise BrokenCheckpoint(f"{name} is a link that leads outside the checkpoint's folder")
    if not path.is_file():
        raise BrokenCheckpoint(f"{name} is missing")
    return path


def weight_files(folder: Path, listing: Collection[str]) -> tuple[str, ...]:
    """Return the names of the safetensors files that hold the weights.

    `listing` names the checkpoint's files; only an index among them has to be in the folder already.
    Raises BrokenCheckpoint when there is neither a single file nor a usable index.
    """
    if SINGLE_FILE in listing:
        return (SINGLE_FILE,)
    if INDEX_FILE in listing:
        return tuple(sorted(set(_read_index(folder).values())))
    kinds = sorted({PurePath(name).suffix for name in listing} & _OTHER_WEIGHTS)
    found = f"; azu does not read its {', '.join(kinds)} files" if kinds else ""
    raise BrokenCheckpoint(f"the checkpoint has neither {SINGLE_FILE} nor {INDEX_FILE}{found}")


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint by name, without reading a weight.

    Raises BrokenCheckpoint that names the file when a file is missing, truncated, no safetensors file or
    outside the folder, or when it lacks a tensor that the index promises.
    """
    files = weight_files(folder, {path.name for path in folder.iterdir()})
    stored = {name: _read_header(contained_file(folder, name), name) for name in files}
    if files == (SINGLE_FILE,):
        return stored[SINGLE_FILE]
    tensors: dict[str, StoredTensor] = {}
    for tensor, name in _read_index(folder).items():
        if tensor not in stored[name]:
            raise BrokenCheckpoint(f"{name} lacks the tensor {tensor!r} that {INDEX_FILE} promises")
        tensors[tensor] = stored[name][tensor]
    return tensors


def read_range(tensor: StoredTensor, offset: int, size: int) -> Iterator[memoryview]:
    """Yield a range of the tensor's file in chunks of CHUNK_BYTES or less, each valid until the next.

    Raises BrokenCheckpoint when the file ends within the range.
    """
    buffer = np.empty(min(CHUNK_BYTES, size), dtype=np.uint8).data
    with tensor.path.open("rb", buffering=0) as file:
        end = offset + size
        while offset < end:
            chunk = buffer[: end - offset]
            filled = 0
            while filled < chunk.nbytes:
                count = os.preadv(file.fileno(), [chunk[filled:]], offset + filled)
                if count == 0:
                    raise BrokenCheckpoint(f"{tensor.file} became shorter while it was read")
                filled += count
            yield chunk
            offset += filled


def _read_index(folder: Path) -> dict[str, str]:
    path = contained_file(folder, INDEX_FILE)
    try:
        index = _Index.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BrokenCheckpoint(
            f"{INDEX_FILE} is not a weight index: {plain_fault(error.errors())[1]}"
        ) from error
    for name in set(index.weight_map.values()):
        if "/" in name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise BrokenCheckpoint(f"{INDEX_FILE} names {name!r}, which is no safetensors file beside it")
    if not index.weight_map:
        raise BrokenCheckpoint(f"{INDEX_FILE} names no tensor")
    return index.weight_map


def _read_header(path: Path, name: str) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        start = file.read(_HEADER_LENGTH_BYTES)
        if start.startswith(_PICKLE_STARTS):
            raise BrokenCheckpoint(f"{name} is a pickle, not a safetensors file")
        header_bytes = int.from_bytes(start, "little")
        if len(start) < _HEADER_LENGTH_BYTES or header_bytes > path.stat().st_size - _HEADER_LENGTH_BYTES:
            raise BrokenCheckpoint(f"{name} is truncated or no safetensors file: its header is incomplete")
        if header_bytes > MAX_HEADER_BYTES:
            raise BrokenCheckpoint(
                f"{name} has a header of {header_bytes} bytes, more than {MAX_HEADER_BYTES}"
            )
        try:
            # The library checks that offsets, shapes and the file's size agree.
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            reason = plain_reason(error, "its header does not fit its size")
            raise BrokenCheckpoint(f"{name} is truncated or no safetensors file: {reason}") from error
        header: dict[str, Any] = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    data_start = _HEADER_LENGTH_BYTES + header_bytes
    return {
        tensor: StoredTensor(
            name=tensor,
            file=name,
            path=path,
            dtype=_DTYPES.get(entry["dtype"], entry["dtype"]),
            shape=tuple(entry["shape"]),
            offset=data_start + entry["data_offsets"][0],
            size_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for tensor, entry in header.items()
    }
