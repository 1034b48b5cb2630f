"""Repair: puts pieces of one running model elsewhere, lost or not, and lets its sequences go on."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay
from tenacity.wait import wait_random_exponential

from azu.errors import InsufficientCapacity, WorkerLost
from azu.planner.moves import Change
from azu.protocol.topology import Loss, Topology

log = logging.getLogger(__name__)

Replan = Callable[[Loss], Awaitable[Topology]]
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

    async def fence(self, loss: Loss) -> None:
        """Make sure that what is lost stays lost, and give its memory back."""

    def install(self) -> Loss:
        """Take what was brought up beside the running pieces as theirs; return which these are."""

    async def bring_up(self, topology: Topology, loss: Loss) -> Loss:
        """Load lost pieces where the topology has them now; return those that it did not work for."""

    async def relink(self, topology: Topology) -> Loss:
        """Tell every stage its new neighbours that does not know them; return those that did not take it."""

    async def resume(self, topology: Topology, empty_stages: frozenset[int], *, is_repair: bool) -> None:
        """Have the pipeline fill the empty stages and go on; raises WorkerLost when it is gone.

        `is_repair` says that something was lost or at fault, and not only moved or resized.
        """


@dataclass(frozen=True, slots=True)
class _Move:
    """A change that is wanted; `done` says whether it was made."""

    change: Change
    commit: Commit
    done: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def is_on(self, lost: Loss) -> bool:
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
    fresh: Loss
    missing: Loss


class Repair:
    """Waits for losses and repairs one after another, those that come meanwhile included.

    `replan` finds new places under a new epoch; it raises InsufficientCapacity when there is none, and is
    asked again for `patience_s`.
    """

    def __init__(self, pieces: Pieces, replan: Replan, *, patience_s: float) -> None:
        self._pieces = pieces
        self._replan = replan
        self._patience_s = patience_s
        self._lost = Loss()
        self._is_fault = False
        self._noticed = asyncio.Event()
        self._wanted: _Move | None = None
        self._is_busy = False
        self._last_completed = -1
        self._fruitless = 0

    def lost(self, loss: Loss) -> None:
        """Hear of a loss, from whoever notices; hearing of it twice changes nothing."""
        self._lost |= loss
        if self._lost:
            self._noticed.set()

    def again(self, *, is_fault: bool) -> None:
        """Have everything linked once more, though no piece is lost; a fault may not come again and again."""
        self._is_fault |= is_fault
        self._noticed.set()

    async def move(self, change: Change, commit: Commit) -> bool:
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

    async def _replace(self, down: Loss, watch: "_Watch") -> "_Turn":
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

    async def _place(self, down: Loss) -> Topology:
        looks = AsyncRetrying(
            retry=retry_if_exception_type(InsufficientCapacity),
            stop=stop_after_delay(self._patience_s),
            wait=wait_random_exponential(multiplier=_FIRST_LOOK_S, max=_LONGEST_LOOK_S),
            before_sleep=_say,
            reraise=True,
        )
        return await looks(self._replan, down)

    def _take(self) -> Loss:
        lost, self._lost, self._is_fault = self._lost, Loss(), False
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
