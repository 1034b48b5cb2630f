"""The frame: one tensor on the wire, with all that a receiver needs to check it.

Layout, little endian: a fixed header, a table of (sequence id, position, token count), the tensor's raw
bytes. The checksum (XXH3, 64 bit) covers header, table and bytes. Nothing is pickled.
"""

import struct
from dataclasses import dataclass
from math import prod

import xxhash

from azu.errors import FrameError

MAGIC = b"AZUF"
VERSION = 1
MAX_DIMS = 4
# dtype (torch's name) -> its code on the wire and its size in bytes; a code is never reused.
DTYPES: dict[str, tuple[int, int]] = {
    "float32": (1, 4),
    "float16": (2, 2),
    "bfloat16": (3, 2),
    "int64": (4, 8),
    "int32": (5, 4),
}
_NAMES = {code: name for name, (code, _) in DTYPES.items()}
# magic, version, dtype, dims, sender stage, epoch, micro-batch, step, shape, table rows, payload bytes
_HEADER = struct.Struct("<4sHBBIIIQ4IIQ")
_CHECKSUM = struct.Struct("<Q")
_ROW = struct.Struct("<QII")
_PREFIX_BYTES = _CHECKSUM.size + _HEADER.size


@dataclass(frozen=True, slots=True)
class FrameRow:
    """The next `num_tokens` rows of the tensor belong to one sequence, from `position` on."""

    sequence_id: int
    position: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Frame:
    """A tensor's raw bytes, with their sender and step.

    `stage` is the sender's stage index. `payload` may be a view of the received bytes, without a copy.
    """

    epoch: int
    step: int
    micro_batch: int
    stage: int
    dtype: str
    shape: tuple[int, ...]
    rows: tuple[FrameRow, ...]
    payload: bytes | memoryview

    def encode(self) -> bytes:
        """Return the frame as one `bytes` object, Ray's fastest payload."""
        assert 0 < len(self.shape) <= MAX_DIMS, self.shape
        code, size = DTYPES[self.dtype]
        payload = memoryview(self.payload).cast("B")
        assert payload.nbytes == prod(self.shape) * size, (self.shape, self.dtype, payload.nbytes)
        shape = self.shape + (0,) * (MAX_DIMS - len(self.shape))
        header = _HEADER.pack(
            MAGIC, VERSION, code, len(self.shape), self.stage, self.epoch, self.micro_batch, self.step,
            *shape, len(self.rows), payload.nbytes,
        )  # fmt: skip
        table = b"".join(_ROW.pack(row.sequence_id, row.position, row.num_tokens) for row in self.rows)
        digest = xxhash.xxh3_64(header)
        digest.update(table)
        digest.update(payload)
        return b"".join((_CHECKSUM.pack(digest.intdigest()), header, table, payload))

    @classmethod
    def decode(cls, content: bytes) -> "Frame":
        """Check a received frame and return it; its payload is a view of `content`.

        Raises FrameError when version, sizes, table or checksum do not agree.
        """
        if len(content) < _PREFIX_BYTES:
            raise FrameError(f"frame of {len(content)} bytes is shorter than its header")
        (checksum,) = _CHECKSUM.unpack_from(content)
        magic, version, code, dims, stage, epoch, micro_batch, step, *rest = _HEADER.unpack_from(
            content, _CHECKSUM.size
        )
        sizes, num_rows, payload_bytes = tuple(rest[:MAX_DIMS]), rest[MAX_DIMS], rest[MAX_DIMS + 1]
        if magic != MAGIC or version != VERSION:
            raise FrameError(f"not a frame of version {VERSION}")
        body = memoryview(content)[_CHECKSUM.size :]
        if xxhash.xxh3_64_intdigest(body) != checksum:
            raise FrameError(f"frame of stage {stage}, step {step}: wrong checksum")
        dtype = _NAMES.get(code)
        if dtype is None or not 0 < dims <= MAX_DIMS:
            raise FrameError(
                f"frame of stage {stage}, step {step}: unknown dtype {code} or {dims} dimensions"
            )
        shape = sizes[:dims]
        table_bytes = num_rows * _ROW.size
        if len(content) != _PREFIX_BYTES + table_bytes + payload_bytes:
            raise FrameError(f"frame of stage {stage}, step {step}: {len(content)} bytes is not its size")
        if prod(shape) * DTYPES[dtype][1] != payload_bytes:
            raise FrameError(
                f"frame of stage {stage}, step {step}: {payload_bytes} bytes do not fill {shape}"
            )
        table = body[_HEADER.size : _HEADER.size + table_bytes]
        rows = tuple(FrameRow(*row) for row in _ROW.iter_unpack(table))
        if rows and sum(row.num_tokens for row in rows) != shape[0]:
            raise FrameError(f"frame of stage {stage}, step {step}: its table does not cover its rows")
        return cls(
            epoch=epoch, step=step, micro_batch=micro_batch, stage=stage, dtype=dtype, shape=shape,
            rows=rows, payload=body[_HEADER.size + table_bytes :],
        )  # fmt: skip
