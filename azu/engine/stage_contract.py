"""The contract of a stage without torch: its specification, its output, its errors and the piece to blame.

Actors and the control plane import this file, so it must load fast.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from azu.errors import AzuError, FrameError, WorkerLost
from azu.logs import log_context
from azu.protocol.step import SequenceFault, StepBatch
from azu.protocol.structure import Structure
from azu.protocol.topology import PieceSet, Stage, Topology
from azu.supervision import as_known_error
from azu.units import MIB


@dataclass(frozen=True, slots=True)
class StageSpec:
    """All that a stage is built from. `shard_paths` maps the names of its shards to files on this node.

    `sent_log_bytes` is the host memory for hidden states that it sent, in case the next stage is lost.
    """

    structure: Structure
    stage: Stage
    topology: Topology
    shard_paths: Mapping[str, Path]
    config_folder: Path
    device: str
    expert_timeout_s: float = 30.0
    sent_log_bytes: int = 64 * MIB


@dataclass(frozen=True, slots=True)
class Handoff:
    """The output of a stage for the next one."""

    batch: StepBatch
    frame: bytes


class OldEpoch(FrameError):
    """A step of an older topology; the receiver drops it and blames no piece."""


class BadFrame(FrameError):
    """A malformed or unexpected frame from another stage, `sender`."""

    def __init__(self, sender: int, fault: str) -> None:
        super().__init__(f"stage {sender} sent a bad frame: {fault}")
        self.sender = sender


class ExpertsFailed(WorkerLost):
    """An expert set is lost or silent, or its answer is wrong."""

    def __init__(self, expert_set: int, fault: str) -> None:
        super().__init__(f"expert set {expert_set}: {fault}")
        self.expert_set = expert_set


class RowsNotFinite(WorkerLost):
    """An expert set computed values that are not finite for some rows of a finite request."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        super().__init__(f"the experts' values of {len(rows)} rows are not finite")
        self.rows = rows


class OutOfMemory(WorkerLost):
    """A piece has no memory left for the smallest step."""


def fault_of(sequence_id: int, error: Exception, doing: str) -> SequenceFault:
    """Return the fault that ends a sequence for an error of any kind; `doing` says in the log what failed."""
    with log_context(sequence_id=sequence_id):
        known = as_known_error(error, doing)
    return SequenceFault(sequence_id, known.code or "internal_error", known.message)


def is_bad_frame(error: AzuError) -> bool:
    """Say whether another piece sent wrong content, in contrast to being lost or silent."""
    if isinstance(error, ExpertsFailed):
        return isinstance(error.__cause__, FrameError)
    return isinstance(error, BadFrame)


def blamed(error: AzuError, stage: int) -> PieceSet:
    """Return the piece that caused a stage's error: the piece that the error names, else the stage."""
    match error:
        case ExpertsFailed(expert_set=index):
            return PieceSet(expert_sets=frozenset({index}))
        case BadFrame(sender=sender):
            return PieceSet(stages=frozenset({sender}))
    return PieceSet(stages=frozenset({stage}))
