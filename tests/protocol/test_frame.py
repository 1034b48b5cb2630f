"""A frame arrives as it was sent, or it is refused and its sender is named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azu.errors import FrameError
from azu.protocol.frame import DTYPES, Frame, FrameRow


def frame(**given: object) -> Frame:
    values: dict[str, object] = {
        "epoch": 3,
        "step": 17,
        "micro_batch": 1,
        "stage": 2,
        "dtype": "float32",
        "shape": (3, 4),
        "rows": (FrameRow(5, 0, 2), FrameRow(6, 9, 1)),
        "payload": bytes(range(48)),
    }
    return Frame(**(values | given))  # type: ignore[arg-type]


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(min_value=0, max_value=5), min_size=1, max_size=4)))
    values = 1
    for size in shape:
        values *= size
    rows, left = [], shape[0]
    while left:
        taken = draw(st.integers(min_value=1, max_value=left))
        rows.append(FrameRow(draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**32 - 1)), taken))
        left -= taken
    size = values * DTYPES[dtype][1]
    counters = st.integers(min_value=0, max_value=2**32 - 1)
    return Frame(
        epoch=draw(counters),
        step=draw(counters),
        micro_batch=draw(counters),
        stage=draw(counters),
        dtype=dtype,
        shape=shape,
        rows=tuple(rows),
        payload=draw(st.binary(min_size=size, max_size=size)),
    )


@given(sent=frames())
def test_a_frame_arrives_as_it_was_sent(sent: Frame) -> None:
    assert Frame.decode(sent.encode()) == sent


@settings(max_examples=300)
@given(sent=frames(), data=st.data())
def test_a_frame_with_any_bit_flipped_is_refused(sent: Frame, data: st.DataObject) -> None:
    content = bytearray(sent.encode())
    bit = data.draw(st.integers(min_value=0, max_value=len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8

    with pytest.raises(FrameError):
        Frame.decode(bytes(content))


@given(sent=frames(), data=st.data())
def test_a_frame_cut_short_or_followed_by_more_is_refused(sent: Frame, data: st.DataObject) -> None:
    content = sent.encode()
    with pytest.raises(FrameError):
        Frame.decode(content[: data.draw(st.integers(min_value=0, max_value=len(content) - 1))])
    with pytest.raises(FrameError):
        Frame.decode(content + b"\0")


@given(content=st.binary(max_size=300))
def test_random_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(FrameError):
        Frame.decode(content)


def test_a_frame_whose_table_does_not_cover_its_rows_is_refused() -> None:
    with pytest.raises(FrameError, match="table does not cover"):
        Frame.decode(frame(rows=(FrameRow(5, 0, 2),)).encode())


def test_a_refused_frame_names_the_stage_that_sent_it() -> None:
    content = bytearray(frame().encode())
    content[-1] ^= 1
    with pytest.raises(FrameError, match="stage 2, step 17"):
        Frame.decode(bytes(content))


def test_the_payload_is_a_view_and_not_a_copy() -> None:
    assert isinstance(Frame.decode(frame().encode()).payload, memoryview)
