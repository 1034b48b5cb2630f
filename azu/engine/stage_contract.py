"""What a stage is built from and what it hands on. No torch here: the scheduler deals in these too."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from azu.errors import AzuError, FrameError, WorkerLost
from azu.protocol.step import StepBatch
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, PieceSet, Stage
from azu.units import MIB


@dataclass(frozen=True, slots=True)
class StageSpec:
    """All that a stage is built from. `shard_paths` maps the names of its shards to files on this node.

    `num_blocks` of `block_size` tokens is its KV capacity; `expert_sets` are those of the whole topology.
    `sent_log_bytes` of host memory keep what it sent, for a receiver that is lost.
    """

    structure: Structure
    stage: Stage
    epoch: int
    num_blocks: int
    block_size: int
    shard_paths: Mapping[str, Path]
    config_folder: Path
    device: str
    expert_sets: tuple[ExpertSet, ...] = ()
    expert_timeout_s: float = 30.0
    sent_log_bytes: int = 64 * MIB


@dataclass(frozen=True, slots=True)
class Handoff:
    """What the next stage is given."""

    batch: StepBatch
    frame: bytes


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


def blamed(error: AzuError, stage: int) -> PieceSet:
    """Return whom a stage's fault is put down to: the stage itself, unless the error names another piece."""
    match error:
        case ExpertsFailed(expert_set=chosen):
            return PieceSet(expert_sets=frozenset({chosen}))
        case BadFrame(sender=sender):
            return PieceSet(stages=frozenset({sender}))
    return PieceSet(stages=frozenset({stage}))
