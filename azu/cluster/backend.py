"""The port through which a deployment reaches its actors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from azu.engine.canary import CanaryAnswer
from azu.errors import AzuError
from azu.models.status import ModelStatus
from azu.planner.replicas import ExpertCounts
from azu.protocol.job import ChoiceKey, Job, JobRun, PauseReport, PipelineLook
from azu.protocol.node import Node
from azu.protocol.step import PieceProgress
from azu.protocol.structure import Structure
from azu.protocol.topology import LossReport, Piece, Topology


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The names of the actors that a stage calls: its expert sets by index, the next stage, the pipeline."""

    expert_sets: Mapping[int, str]
    next_stage: str | None
    pipeline: str


class DeploymentBackend(Protocol):
    """The actors of deployments, each known by its name; every method that waits raises AzuErrors only.

    There are two implementations: Ray's actors, and the tests' stand-in without a cluster.
    """

    nodes: Mapping[str, Node]  # every node that reported, by id, also those that went lately

    async def structure(self, model_id: str, revision: str) -> Structure:
        """Return the structure of a model; the first call for a model cuts it."""

    async def status(self, model_id: str) -> ModelStatus:
        """Return how far a model's files are; raises Unavailable where that is not known at once."""

    async def sweep(self, kept: frozenset[str]) -> frozenset[str]:
        """Kill every piece and pipeline except those of these names; return which of these live."""

    async def probe(self, node_ids: frozenset[str]) -> None:
        """Have those of these nodes suspected that do not answer."""

    def blame(self, node_id: str) -> None:
        """Count a bad frame against the node that sent it."""

    def mark(self, node_id: str, model_id: str, layer: int, owner: str) -> None:
        """Mark a node that computed values for a sequence of `owner` that are not finite."""

    async def start(self, name: str, piece: Piece) -> None:
        """Reserve a piece's VRAM on its node and start its actor there."""

    async def find(self, name: str) -> bool:
        """Take over an actor that another scheduler started; release what is left of one that is gone."""

    async def fetch(self, name: str, piece: Piece, structure: Structure) -> None:
        """Fetch the shards of a piece to its node, before it is started there under this name."""

    async def load(
        self, name: str, piece: Piece, structure: Structure, topology: Topology, to: Neighbours
    ) -> None:
        """Fetch a piece's shards to its node and load them; a stage learns its neighbours."""

    async def link(self, name: str, topology: Topology, to: Neighbours) -> None:
        """Give a loaded stage its neighbours under a newer topology."""

    async def ping(self, name: str, piece: Piece) -> PieceProgress:
        """Return after about a second how far an actor is; raises an AzuError once its process dies.

        There is no answer as long as the process is stopped or cut off.
        """

    async def num_chosen(self, name: str) -> ExpertCounts:
        """Return how often a stage chose each expert, in layers whose experts are apart from their router."""

    def kill(self, name: str) -> None:
        """End an actor and give its VRAM back; for an actor that is gone, only the latter.

        It raises nothing: what cannot be ended now is tried again in the background.
        """

    async def start_pipeline(self, name: str, structure: Structure, topology: Topology) -> None:
        """Start a pipeline; it schedules nothing before `begin`."""

    async def begin(self, pipeline: str, stages: Sequence[str], expert_sets: Mapping[int, str]) -> None:
        """Have a new pipeline send steps through these stages; it asks the expert sets what they ran."""

    async def run(self, pipeline: str, job: Job) -> JobRun:
        """Run a job to its end; raises WorkerLost when the pipeline dies."""

    async def cancel(self, pipeline: str, job_id: str) -> None:
        """End a job's sequences within one step."""

    async def end(self, pipeline: str, job_id: str, error: AzuError) -> None:
        """End a job with what was delivered, and this error."""

    async def look(self, pipeline: str) -> PipelineLook:
        """Return what the pipeline and its jobs do."""

    async def canary(self, pipeline: str) -> CanaryAnswer:
        """Have the pipeline continue the canary's prompts, behind all jobs."""

    async def running_jobs(self, pipeline: str) -> frozenset[str]:
        """Return the ids of the jobs that have not ended in the pipeline."""

    async def limit(self, pipeline: str, num_blocks: int) -> int:
        """Have no sequence admitted that `num_blocks` would not hold; return how many are still needed."""

    async def pause(self, pipeline: str) -> PauseReport:
        """Have the pipeline forget what is in flight and wait."""

    async def resume(
        self,
        pipeline: str,
        topology: Topology,
        stages: Sequence[str],
        expert_sets: Mapping[int, str],
        empty: frozenset[int],
        *,
        alone: frozenset[ChoiceKey],
        is_repair: bool,
    ) -> None:
        """Have the pipeline fill the empty stages and go on; `is_repair` after a loss or a fault.

        Each of the choices `alone` shares no step with another until it comes further.
        """

    async def next_loss(self, pipeline: str) -> LossReport | None:
        """Wait about a second for pieces that the stages report as lost."""

    def fail(self, pipeline: str, error: AzuError) -> None:
        """End every job of the pipeline with what was delivered, and this error."""
