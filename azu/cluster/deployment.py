"""Repair: puts pieces of one running model elsewhere, lost or not, and lets its sequences go on."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay
from tenacity.wait import wait_random_exponential

from azu.cluster.deployment_store import DeploymentRecord
from azu.errors import InsufficientCapacity, WorkerLost
from azu.jobs.dispatch import RunningModel
from azu.planner.migration import TopologyChange
from azu.planner.replicas import ExpertCounts
from azu.protocol.job import Placement
from azu.protocol.structure import Structure
from azu.protocol.topology import PieceSet, Topology

log = logging.getLogger(__name__)

# Where a model's lost pieces go: a topology of a newer epoch. Raises InsufficientCapacity when nowhere.
Replan = Callable[[PieceSet], Awaitable[Topology]]
# Makes a planned topology the one that runs, under a new epoch.
Commit = Callable[[], Awaitable[Topology]]

# Whoever loses pieces this often without a step in between does not lose them by accident.
_MOST_FRUITLESS = 5
_MOST_ROUNDS = 5
# What a lost piece held is reported as free a heartbeat later.
_FIRST_LOOK_S = 0.25
_LONGEST_LOOK_S = 1.0


class Pieces(Protocol):
    """The actors of one deployed model: its stages, its expert sets and its pipeline."""

    async def pause(self) -> int:
        """Have the pipeline forget what is in flight and wait; return how many steps it has completed.

        A pipeline that is gone is replaced by another.
        """

    async def fence(self, loss: PieceSet) -> None:
        """Make sure that what is lost stays lost, and give its memory back."""

    def install(self) -> PieceSet:
        """Take what was brought up beside the running pieces as theirs; return which these are."""

    async def bring_up(self, topology: Topology, loss: PieceSet) -> PieceSet:
        """Load lost pieces where the topology has them now; return those that it did not work for."""

    async def relink(self, topology: Topology) -> PieceSet:
        """Tell every stage its new neighbours that does not know them; return those that did not take it."""

    async def resume(self, topology: Topology, empty_stages: frozenset[int], *, is_repair: bool) -> None:
        """Have the pipeline fill the empty stages and go on; raises WorkerLost when it is gone.

        `is_repair` says that something was lost or at fault, and not only moved or resized.
        """


@dataclass(frozen=True, slots=True)
class _Move:
    """A change that is wanted; `done` says whether it was made."""

    change: TopologyChange
    commit: Commit
    done: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def is_on(self, lost: PieceSet) -> bool:
        """Say whether it can be made: nothing is lost, and whoever wants it still waits."""
        if lost and not self.done.done():
            self.done.set_result(False)
        return not self.done.done()

    def ended(self) -> str:
        """Say that it was made, unless it was given up before; return what became of the model."""
        if not self.done.done():
            self.done.set_result(True)
            return "moved"
        return "repaired"


@dataclass(frozen=True, slots=True)
class _Turn:
    """A topology that is to run now: the pieces that hold nothing yet, and those of them that are not up."""

    topology: Topology
    fresh: PieceSet
    missing: PieceSet


class Repair:
    """Waits for losses and repairs one after another, those that come meanwhile included.

    `replan` finds new places under a new epoch; it raises InsufficientCapacity when there is none, and is
    asked again for `patience_s`.
    """

    def __init__(self, pieces: Pieces, replan: Replan, *, patience_s: float) -> None:
        self._pieces = pieces
        self._replan = replan
        self._patience_s = patience_s
        self._lost = PieceSet()
        self._is_fault = False
        self._noticed = asyncio.Event()
        self._wanted: _Move | None = None
        self._is_busy = False
        self._last_completed = -1
        self._fruitless = 0

    def lost(self, loss: PieceSet) -> None:
        """Hear of a loss, from whoever notices; hearing of it twice changes nothing."""
        self._lost |= loss
        if self._lost:
            self._noticed.set()

    def again(self, *, is_fault: bool) -> None:
        """Have everything linked once more, though no piece is lost; a fault may not come again and again."""
        self._is_fault |= is_fault
        self._noticed.set()

    async def move(self, change: TopologyChange, commit: Commit) -> bool:
        """Change places though nothing is lost; False when something is, and everything stays as it was.

        A change counts from the topology that runs now: whoever is repairing it comes first.
        """
        if self._is_busy or self._wanted is not None:
            return False
        self._wanted = move = _Move(change, commit)
        self._noticed.set()
        return await move.done

    async def run(self) -> None:
        """Repair until cancelled; raises what made a repair impossible, an AzuError."""
        while True:
            await self._noticed.wait()
            self._is_busy = True
            move, self._wanted = self._wanted, None
            await self._repair(move)
            self._is_busy = False

    async def _repair(self, move: _Move | None) -> None:
        watch = _Watch()
        completed = await self._pieces.pause()
        if is_repair := bool(self._lost) or self._is_fault:
            self._count_fruitless(completed)
        empty: frozenset[int] = frozenset()
        down = self._take()
        turn = await self._switch(move) if move is not None and move.is_on(down) else None
        for _ in range(_MOST_ROUNDS):
            turn = turn or await self._replace(down, watch)
            empty |= turn.fresh.stages
            failed = await self._pieces.bring_up(turn.topology, turn.missing)
            watch.passed("up")
            down = failed | await self._pieces.relink(turn.topology) | self._take()
            watch.passed("linked")
            is_repair |= bool(down)
            if not down and await self._resumed(turn.topology, empty, is_repair=is_repair):
                watch.passed("resumed")
                log.warning("%s: %s", "repaired" if move is None else move.ended(), watch)
                return
            turn = None
        raise WorkerLost(f"{down} could not be brought up in {_MOST_ROUNDS} tries")

    async def _replace(self, down: PieceSet, watch: "_Watch") -> "_Turn":
        """Find new places for what is lost."""
        if down:
            log.warning("lost %s", down)
        await self._pieces.fence(down)
        watch.passed("fenced")
        topology = await self._place(down)
        watch.passed("placed")
        return _Turn(topology, fresh=down, missing=down)

    async def _switch(self, move: _Move) -> "_Turn":
        """Go over to another topology."""
        # From here on a loss is one by the new indices: nothing that goes is heard of any more.
        await self._pieces.fence(move.change.gone)
        installed = self._pieces.install()
        fresh = move.change.fresh
        return _Turn(await move.commit(), fresh, missing=fresh - installed)

    async def _resumed(self, topology: Topology, empty: frozenset[int], *, is_repair: bool) -> bool:
        try:
            await self._pieces.resume(topology, empty, is_repair=is_repair)
        except WorkerLost as error:
            log.warning("%s", error.message)
            # There is another pipeline now, which everything has to be linked to.
            await self._pieces.pause()
            return False
        return True

    async def _place(self, down: PieceSet) -> Topology:
        looks = AsyncRetrying(
            retry=retry_if_exception_type(InsufficientCapacity),
            stop=stop_after_delay(self._patience_s),
            wait=wait_random_exponential(multiplier=_FIRST_LOOK_S, max=_LONGEST_LOOK_S),
            before_sleep=_say,
            reraise=True,
        )
        return await looks(self._replan, down)

    def _take(self) -> PieceSet:
        lost, self._lost, self._is_fault = self._lost, PieceSet(), False
        self._noticed.clear()
        return lost

    def _count_fruitless(self, completed: int) -> None:
        self._fruitless = self._fruitless + 1 if completed == self._last_completed else 0
        self._last_completed = completed
        if self._fruitless >= _MOST_FRUITLESS:
            raise WorkerLost(f"{self._lost} was lost {_MOST_FRUITLESS} times without a step in between")


class _Watch:
    """How many seconds into a repair each of its steps was done."""

    def __init__(self) -> None:
        self._begun_s = time.monotonic()
        self._steps: list[str] = []

    def passed(self, step: str) -> None:
        self._steps.append(f"{step} {time.monotonic() - self._begun_s:.2f} s")

    def __str__(self) -> str:
        return ", ".join(self._steps)


def _say(state: RetryCallState) -> None:
    assert state.outcome is not None
    log.warning("%s", state.outcome.exception())


class DeployedModel(RunningModel, Protocol):
    """A running model that the fleet may also take down."""

    # Where its pieces are; the fleet sets it when some were lost.
    topology: Topology

    @property
    def structure(self) -> Structure:
        """What it is made of."""

    def placements(self) -> tuple[Placement, ...]:
        """Return the receipt's lines: which node runs which layers and experts in which actor."""

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

    async def move(self, change: TopologyChange, commit: Commit, *, beside: bool) -> bool:
        """Go over to other places, brought up `beside` what runs; False when everything stays as it was."""

    async def num_chosen(self) -> ExpertCounts:
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

    async def adopt(self, structure: Structure, standing: DeploymentRecord, replan: Replan) -> DeployedModel:
        """Take over a model that another scheduler brought up; what of it is gone is brought up again."""

    async def sweep(self, kept: frozenset[str]) -> frozenset[str]:
        """Take down every actor of a model but those of these names; return which of these live."""
