"""The piece that caused a fault is blamed, not the one that noticed it."""

import pickle

import pytest

from azu.engine.stage_contract import BadFrame, ExpertsFailed, OldEpoch, blamed, is_bad_frame
from azu.errors import AzuError, DeadlineExceeded, FrameError
from azu.protocol.topology import PieceSet


@pytest.mark.parametrize(
    ("error", "loss"),
    [
        (BadFrame(1, "wrong checksum"), PieceSet(stages=frozenset({1}))),
        (ExpertsFailed(0, "did not answer in time"), PieceSet(expert_sets=frozenset({0}))),
        (FrameError("logits that are not finite"), PieceSet(stages=frozenset({2}))),
    ],
)
def test_the_piece_at_fault_is_blamed(error: AzuError, loss: PieceSet) -> None:
    assert blamed(error, stage=2) == loss


def _failed_by(cause: AzuError) -> ExpertsFailed:
    error = ExpertsFailed(0, cause.message)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (BadFrame(1, "wrong checksum"), True),
        (_failed_by(FrameError("wrong checksum")), True),
        (_failed_by(DeadlineExceeded("did not answer in time")), False),
        (FrameError("logits that are not finite"), False),
        (OldEpoch("old"), False),
    ],
)
def test_only_content_that_another_piece_sent_is_a_bad_frame(error: AzuError, counts: bool) -> None:
    assert is_bad_frame(error) is counts


def test_an_error_keeps_its_sender_across_a_process_border() -> None:
    arrived = pickle.loads(pickle.dumps(BadFrame(1, "wrong checksum")))

    assert (type(arrived), arrived.sender) == (BadFrame, 1)
    assert str(arrived) == arrived.message == "stage 1 sent a bad frame: wrong checksum"
