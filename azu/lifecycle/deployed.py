"""A model that is up, and whoever brings models up, as the fleet sees them."""

from collections.abc import Awaitable, Callable
from typing import Protocol

from azu.lifecycle.dispatch import RunningModel
from azu.lifecycle.standing import Standing
from azu.planner.hot_experts import Counts
from azu.planner.moves import Change
from azu.protocol.structure import Structure
from azu.protocol.topology import Loss, Topology

# Where a model's lost pieces go: a topology of a newer epoch. Raises InsufficientCapacity when nowhere.
Replan = Callable[[Loss], Awaitable[Topology]]
# Makes a planned topology the one that runs, under a new epoch.
Commit = Callable[[], Awaitable[Topology]]


class DeployedModel(RunningModel, Protocol):
    """A running model that the fleet may also take down."""

    # Where its pieces are; the fleet sets it when some were lost.
    topology: Topology

    @property
    def structure(self) -> Structure:
        """What it is made of."""

    @property
    def running_jobs(self) -> int:
        """Jobs that are expected here and were not let go."""

    def expect(self, job_id: str) -> None:
        """Hear that a job is going to run here."""

    def holds(self, job_id: str) -> bool:
        """Whether a job runs here, or did without coming to an end: nobody else may run it."""

    @property
    def broken(self) -> bool:
        """Whether what was lost could not be replaced: it takes no new jobs."""

    def node_died(self, node_id: str) -> None:
        """Hear that a node is dead, or is to be left: what it holds comes up elsewhere."""

    async def move(self, change: Change, commit: Commit, *, beside: bool) -> bool:
        """Go over to other places, brought up `beside` what runs; False when everything stays as it was."""

    async def num_chosen(self) -> Counts:
        """Return how often each expert was chosen in layers that have experts apart from their router.

        Raises an AzuError when a stage does not say.
        """

    async def resize(self, num_blocks: int) -> None:
        """Have another number of KV blocks; those that sequences need alone are kept."""

    async def close(self) -> None:
        """Take every piece down."""


class Builder(Protocol):
    """Cuts models and brings their pieces up on nodes."""

    async def structure(self, model_id: str, revision: str) -> Structure:
        """Return the structure of a model, cutting it first when nobody has."""

    async def build(self, structure: Structure, topology: Topology, replan: Replan) -> DeployedModel:
        """Bring up every piece of a topology; what was half up is taken down when it fails.

        `replan` is for pieces that are lost later.
        """

    async def adopt(self, structure: Structure, standing: Standing, replan: Replan) -> DeployedModel:
        """Take over a model that another scheduler brought up; what of it is gone is brought up again."""

    async def sweep(self, kept: frozenset[str]) -> frozenset[str]:
        """Take down every actor of a model but those of these names; return which of these live."""
