"""The layout of a step in a forward: the rows of each slice, and the KV slots that are written and read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from azu.errors import FrameError
from azu.protocol.step import Slice


@dataclass(frozen=True, slots=True)
class Span:
    """A slice of several tokens: its rows [row, row_end) and keys [key, key_end) in a packed forward."""

    row: int
    row_end: int
    key: int
    key_end: int
    position: int


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """All slices of one token, attended in one call. Their keys come first, `num_keys` places for each.

    `rows` [num_slices] are their rows in the forward, `positions` [num_slices] their positions. A sequence
    shorter than `num_keys` also reads places that are masked.
    """

    rows: Tensor
    positions: Tensor
    num_keys: int
    ragged: bool

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a step in a forward.

    `position_ids` is [batch, tokens]; `write` [tokens] and `read` are KV slots; `last_rows` [num_slices] is
    the flat row of each slice's last token. `padding` [batch, tokens] is False where a row is not a token; it
    is None in a packed forward, which has `spans` and `singles` instead. Three maxima over the slices:
    `longest` counts keys, `most_tokens` tokens of the slice, `sequence_length` known tokens of the sequence.
    """

    slices: tuple[Slice, ...]
    position_ids: Tensor
    write: Tensor
    read: Tensor
    last_rows: Tensor
    longest: int
    most_tokens: int
    sequence_length: int
    spans: tuple[Span, ...] = ()
    singles: DecodeRows | None = None
    padding: Tensor | None = None
    attention_mask: Tensor | None = None

    def batched(self, rows: Tensor) -> Tensor:
        """Put rows [tokens, ...], slice after slice, into the forward's shape [batch, tokens, ...]."""
        if self.padding is None:
            return rows[None]
        batch = rows.new_zeros(*self.padding.shape, *rows.shape[1:])
        batch[self.padding] = rows
        return batch

    def flat(self, batch: Tensor) -> Tensor:
        """Return the rows [tokens, ...] of a forward's output [batch, tokens, ...]."""
        return batch[0] if self.padding is None else batch[self.padding]


class LayoutBuilder:
    """Makes the layouts of steps over a pool of `num_blocks` blocks of `block_size` slots."""

    def __init__(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._device = device

    def packed(self, slices: Sequence[Slice]) -> Layout:
        """Return a layout with all tokens in one row, one slice after the other."""
        slots = [self._slots(slice_) for slice_ in slices]
        starts = _starts(slices)
        singles = self._singles(slices, starts)
        key = len(singles) * singles.num_keys if singles else 0
        read = [_padded(slots[index], singles.num_keys) for index in _single(slices)] if singles else []
        spans = []
        for slice_, row, own in zip(slices, starts, slots, strict=True):
            if slice_.num_tokens > 1:
                spans.append(Span(row, row + slice_.num_tokens, key, key + len(own), slice_.position))
                key += len(own)
                read.append(own)
        lengths = [len(own) for own in slots]
        return Layout(
            slices=tuple(slices),
            position_ids=self._put(torch.cat([_positions(slice_) for slice_ in slices])[None]),
            write=self._put(torch.cat([own[p.position :] for own, p in zip(slots, slices, strict=True)])),
            read=self._put(torch.cat(read)),
            last_rows=self._put(
                torch.tensor([row + p.num_tokens - 1 for row, p in zip(starts, slices, strict=True)])
            ),
            longest=max(lengths),
            most_tokens=max(slice_.num_tokens for slice_ in slices),
            sequence_length=max(slice_.sequence_length for slice_ in slices),
            spans=tuple(spans),
            singles=singles,
        )

    def padded(self, slices: Sequence[Slice]) -> Layout:
        """Return a layout with one row per slice, padded on the left."""
        slots = [self._slots(slice_) for slice_ in slices]
        most_tokens = max(slice_.num_tokens for slice_ in slices)
        longest = max(len(own) for own in slots)
        width = torch.arange(most_tokens)[None]
        reach = torch.arange(longest)[None]
        num_tokens = torch.tensor([slice_.num_tokens for slice_ in slices])[:, None]
        lengths = torch.tensor([len(own) for own in slots])[:, None]
        begins = torch.tensor([slice_.position for slice_ in slices])[:, None]
        return Layout(
            slices=tuple(slices),
            position_ids=self._put((width - most_tokens + num_tokens + begins).clamp(min=0)),
            write=self._put(torch.cat([own[p.position :] for own, p in zip(slots, slices, strict=True)])),
            read=self._put(torch.cat([_padded(own, longest, left=True) for own in slots])),
            last_rows=self._put(torch.arange(1, len(slices) + 1) * most_tokens - 1),
            longest=longest,
            most_tokens=most_tokens,
            sequence_length=max(slice_.sequence_length for slice_ in slices),
            padding=self._put(width >= most_tokens - num_tokens),
            attention_mask=self._put((reach >= longest - lengths).long()),
        )

    def _singles(self, slices: Sequence[Slice], starts: Sequence[int]) -> DecodeRows | None:
        indices = _single(slices)
        if not indices:
            return None
        positions = [slices[index].position for index in indices]
        return DecodeRows(
            rows=self._put(torch.tensor([starts[index] for index in indices])),
            positions=self._put(torch.tensor(positions)),
            num_keys=max(positions) + 1,
            ragged=len(set(positions)) > 1,
        )

    def _slots(self, slice_: Slice) -> Tensor:
        """Return the KV slots of a sequence's tokens in order, up to the slice's last token."""
        length = slice_.position + slice_.num_tokens
        blocks = torch.tensor(slice_.block_ids, dtype=torch.long)
        if (
            slice_.num_tokens < 1
            or len(blocks) * self._block_size < length
            or not 0 <= min(slice_.block_ids) <= max(slice_.block_ids) < self._num_blocks
        ):
            raise FrameError(f"sequence {slice_.sequence_id}: its block table does not hold {length} tokens")
        slots = blocks[:, None] * self._block_size + torch.arange(self._block_size)
        return slots.flatten()[:length]

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


def _single(slices: Sequence[Slice]) -> list[int]:
    return [index for index, slice_ in enumerate(slices) if slice_.num_tokens == 1]


def _starts(slices: Sequence[Slice]) -> list[int]:
    starts, row = [], 0
    for slice_ in slices:
        starts.append(row)
        row += slice_.num_tokens
    return starts


def _positions(slice_: Slice) -> Tensor:
    return torch.arange(slice_.position, slice_.position + slice_.num_tokens)


def _padded(slots: Tensor, length: int, *, left: bool = False) -> Tensor:
    # A mask gives the padding the weight 0, and 0 times NaN is NaN: it reads a slot of the same sequence.
    padding = slots[:1].expand(length - len(slots))
    return torch.cat((padding, slots) if left else (slots, padding))
