"""Whoever caused a fault is replaced, not whoever noticed it."""

import pytest

from azu.engine.faults import BadFrame, ExpertsFailed, blamed
from azu.errors import AzuError, FrameError
from azu.protocol.topology import Loss


@pytest.mark.parametrize(
    ("error", "loss"),
    [
        (BadFrame(1, "wrong checksum"), Loss(stages=frozenset({1}))),
        (ExpertsFailed(0, "did not answer in time"), Loss(expert_sets=frozenset({0}))),
        (FrameError("logits that are not finite"), Loss(stages=frozenset({2}))),
    ],
)
def test_the_piece_at_fault_is_blamed(error: AzuError, loss: Loss) -> None:
    assert blamed(error, stage=2) == loss
