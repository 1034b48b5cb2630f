"""Ways to damage a frame on its way: each function returns another frame than the one that was sent."""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from azu.protocol.frame import DTYPES, Frame, FrameRow

_NUMPY = {"float32": np.float32, "float16": np.float16}
Corrupt = Callable[[random.Random, bytes, list[bytes]], bytes | None]


def flipped_bit(chance: random.Random, frame: bytes, _: list[bytes]) -> bytes:
    content, bit = bytearray(frame), chance.randrange(8 * len(frame))
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


def overwritten(chance: random.Random, frame: bytes, _: list[bytes]) -> bytes:
    """Replace a part by random bytes that differ from it."""
    begin = chance.randrange(len(frame))
    noise = chance.randbytes(chance.randint(8, 64))[: len(frame) - begin]
    if noise == frame[begin : begin + len(noise)]:
        noise = bytes(byte ^ 1 for byte in noise)
    return frame[:begin] + noise + frame[begin + len(noise) :]


def truncated(chance: random.Random, frame: bytes, _: list[bytes]) -> bytes:
    return frame[: chance.randrange(len(frame))]


def longer(chance: random.Random, frame: bytes, _: list[bytes]) -> bytes:
    return frame + chance.randbytes(chance.randint(1, 64))


def missing(chance: random.Random, frame: bytes, _: list[bytes]) -> None:
    return None


def noise(chance: random.Random, frame: bytes, _: list[bytes]) -> bytes:
    return chance.randbytes(len(frame))


def not_finite(chance: random.Random, frame: bytes, _: list[bytes]) -> bytes:
    """Put in a value that is not finite, with a correct checksum."""
    sent = Frame.decode(frame)
    values = np.frombuffer(sent.payload, dtype=_NUMPY[sent.dtype]).copy()
    values[chance.randrange(len(values))] = chance.choice((np.nan, np.inf, -np.inf))
    return replace(sent, payload=values.tobytes()).encode()


def other_dtype(chance: random.Random, frame: bytes, _: list[bytes]) -> bytes:
    sent = Frame.decode(frame)
    size = DTYPES[sent.dtype][1]
    same_size = [name for name, (_, other) in DTYPES.items() if other == size and name != sent.dtype]
    return replace(sent, dtype=chance.choice(same_size)).encode()


def other_shape(chance: random.Random, frame: bytes, _: list[bytes]) -> bytes:
    sent = Frame.decode(frame)
    tokens, hidden = sent.shape
    shapes = ((tokens, hidden, 1), (tokens, hidden // 2, 2), (tokens * hidden,))
    return replace(sent, shape=chance.choice(shapes), rows=()).encode()


def other_size(chance: random.Random, frame: bytes, _: list[bytes]) -> bytes:
    """Append a row, also in the table."""
    sent = Frame.decode(frame)
    row = bytes(sent.payload[: len(sent.payload) // sent.shape[0]])
    last = sent.rows[-1]
    return replace(
        sent,
        shape=(sent.shape[0] + 1, sent.shape[1]),
        rows=(*sent.rows[:-1], replace(last, num_tokens=last.num_tokens + 1)),
        payload=bytes(sent.payload) + row,
    ).encode()


def other_place(chance: random.Random, frame: bytes, _: list[bytes]) -> bytes:
    """Change the epoch, step, micro-batch or stage."""
    sent = Frame.decode(frame)
    name = chance.choice(("epoch", "step", "micro_batch", "stage"))
    here = getattr(sent, name)
    return replace(sent, **{name: chance.choice([n for n in (here - 1, here + 1) if n >= 0])}).encode()


def other_rows(chance: random.Random, frame: bytes, _: list[bytes]) -> bytes:
    """Change the sequence or the position of a row."""
    sent = Frame.decode(frame)
    place = chance.randrange(len(sent.rows))
    row = sent.rows[place]
    changed = chance.choice(
        (
            FrameRow(row.sequence_id + 1, row.position, row.num_tokens),
            FrameRow(row.sequence_id, row.position + 1, row.num_tokens),
        )
    )
    return replace(sent, rows=(*sent.rows[:place], changed, *sent.rows[place + 1 :])).encode()


def replayed(chance: random.Random, frame: bytes, earlier: list[bytes]) -> bytes:
    """Return an earlier frame of the same stage unchanged, if there is one."""
    return chance.choice(earlier) if earlier else flipped_bit(chance, frame, earlier)


WAYS: tuple[Corrupt, ...] = (
    flipped_bit, overwritten, truncated, longer, missing, noise, not_finite, other_dtype, other_shape,
    other_size, other_place, other_rows, replayed,
)  # fmt: skip
