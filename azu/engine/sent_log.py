"""What a stage sent, kept in host memory so that a lost receiver can be filled again."""

from collections.abc import Iterable, Mapping, Sequence

from azu.protocol.step import Slice


class SentLog:
    """Rows of hidden states by sequence and position, at most `max_bytes` of them.

    When there are too many, the sequence that was begun first is dropped: whoever needs its rows computes
    them again from its tokens. A sequence is kept from its position 0 on or not at all.
    """

    def __init__(self, row_bytes: int, max_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._max_bytes = max_bytes
        self._rows: dict[int, bytearray] = {}
        self._num_bytes = 0

    def record(self, slices: Iterable[Slice], payload: memoryview) -> None:
        """Keep the rows of a step, in the order of its slices; those computed again replace the old."""
        offset = 0
        for piece in slices:
            size = piece.num_tokens * self._row_bytes
            self._put(piece.sequence_id, piece.position * self._row_bytes, payload[offset : offset + size])
            offset += size
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= len(self._rows.pop(next(iter(self._rows))))

    def num_rows(self, sequence_ids: Iterable[int]) -> Mapping[int, int]:
        """Return how many rows are kept of each sequence that is known."""
        return {one: len(self._rows[one]) // self._row_bytes for one in sequence_ids if one in self._rows}

    def rows(self, slices: Sequence[Slice]) -> bytes | None:
        """Return the rows of some slices one after another, None unless all of them are kept."""
        parts = []
        for piece in slices:
            begin = piece.position * self._row_bytes
            end = begin + piece.num_tokens * self._row_bytes
            kept = self._rows.get(piece.sequence_id, b"")
            if len(kept) < end:
                return None
            parts.append(kept[begin:end])
        return b"".join(parts)

    def drop(self, sequence_ids: Iterable[int]) -> None:
        """Forget sequences that are over; unknown ones are no error."""
        for sequence_id in sequence_ids:
            self._num_bytes -= len(self._rows.pop(sequence_id, b""))

    def clear(self) -> None:
        """Forget every sequence."""
        self._rows.clear()
        self._num_bytes = 0

    def _put(self, sequence_id: int, begin: int, rows: memoryview) -> None:
        kept = self._rows.get(sequence_id)
        if kept is None and begin == 0:
            kept = self._rows[sequence_id] = bytearray()
        if kept is None or begin > len(kept):
            return
        before = len(kept)
        kept[begin : begin + len(rows)] = rows
        self._num_bytes += len(kept) - before
