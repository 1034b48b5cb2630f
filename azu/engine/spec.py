"""What a stage is built from and what it hands on. No torch here: the scheduler deals in these too."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from azu.protocol.step import StepBatch
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, Stage
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
