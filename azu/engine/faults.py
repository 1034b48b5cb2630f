"""Faults of a step, and which piece is to blame for them. No torch here."""

from azu.errors import AzuError, FrameError, WorkerLost
from azu.protocol.topology import Loss


class OldEpoch(FrameError):
    """A step of a topology that was given up: to be dropped, nobody is to blame."""


class BadFrame(FrameError):
    """A frame from another stage that is not what it should be."""

    def __init__(self, sender: int, fault: str) -> None:
        super().__init__(f"stage {sender} sent a bad frame: {fault}")
        self.sender = sender


class ExpertsFailed(WorkerLost):
    """An expert set that is gone, silent, or answered something else."""

    def __init__(self, expert_set: int, fault: str) -> None:
        super().__init__(f"expert set {expert_set}: {fault}")
        self.expert_set = expert_set


class OutOfMemory(WorkerLost):
    """A piece that has no memory left for the smallest step."""


def is_bad_frame(error: AzuError) -> bool:
    """Say whether a fault is what another piece sent, and not that it is gone or silent."""
    if isinstance(error, ExpertsFailed):
        return isinstance(error.__cause__, FrameError)
    return isinstance(error, BadFrame)


def blamed(error: AzuError, stage: int) -> Loss:
    """Return whom a stage's fault is put down to: the stage itself, unless the error names another piece."""
    match error:
        case ExpertsFailed(expert_set=chosen):
            return Loss(expert_sets=frozenset({chosen}))
        case BadFrame(sender=sender):
            return Loss(stages=frozenset({sender}))
    return Loss(stages=frozenset({stage}))
