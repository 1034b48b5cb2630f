"""A repair loses sight of no piece, whatever else is lost while it is under way."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from azu.cluster.deployment import Repair
from azu.errors import InsufficientCapacity, WorkerLost
from azu.planner.migration import TopologyChange
from azu.protocol.topology import PieceSet, Topology
from tests import builders


def _stages(*indices: int) -> PieceSet:
    return PieceSet(stages=frozenset(indices))


@dataclass
class _Model:
    """Four stages and two expert sets that know what is up, empty or of an old epoch."""

    up: set[int] = field(default_factory=lambda: {0, 1, 2, 3})
    sets_up: set[int] = field(default_factory=lambda: {0, 1})
    empty: set[int] = field(default_factory=set)
    epochs: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(4), 1))
    epoch: int = 1
    completed: int = 0
    running: bool = True
    resumed: asyncio.Event = field(default_factory=asyncio.Event)
    brought_up: list[PieceSet] = field(default_factory=list)
    during_bring_up: list[Callable[[], None]] = field(default_factory=list)
    unable: list[PieceSet] = field(default_factory=list)
    deaf: list[PieceSet] = field(default_factory=list)
    beside: PieceSet = field(default_factory=PieceSet)
    repairs: list[bool] = field(default_factory=list)

    def lose(self, loss: PieceSet) -> None:
        self.up -= loss.stages
        self.sets_up -= loss.expert_sets
        self.empty |= loss.stages

    async def pause(self) -> int:
        self.running = False
        return self.completed

    async def fence(self, loss: PieceSet) -> None:
        self.lose(loss)

    async def replan(self, loss: PieceSet) -> Topology:
        assert not loss.stages & self.up, "only what is fenced is placed again"
        self.epoch += 1
        return builders.topology({name: (i, i + 1) for i, name in enumerate("abcd")}, epoch=self.epoch)

    async def bring_up(self, topology: Topology, loss: PieceSet) -> PieceSet:
        await asyncio.sleep(0)
        failed = self.unable.pop(0) if self.unable else PieceSet()
        done = loss - failed
        self.up |= done.stages
        self.sets_up |= done.expert_sets
        self.epochs |= dict.fromkeys(done.stages, topology.epoch)
        self.brought_up.append(loss)
        if self.during_bring_up:
            self.during_bring_up.pop(0)()
        return failed

    async def relink(self, topology: Topology) -> PieceSet:
        deaf = self.deaf.pop(0) if self.deaf else PieceSet()
        self.epochs |= dict.fromkeys(self.up - deaf.stages, topology.epoch)
        return deaf

    def install(self) -> PieceSet:
        installed, self.beside = self.beside, PieceSet()
        self.up |= installed.stages
        self.sets_up |= installed.expert_sets
        return installed

    async def commit(self) -> Topology:
        return await self.replan(PieceSet())

    async def resume(self, topology: Topology, empty_stages: frozenset[int], *, is_repair: bool) -> None:
        assert self.up == {0, 1, 2, 3}
        assert self.sets_up == {0, 1}
        assert empty_stages >= self.empty, "what is empty is filled"
        assert set(self.epochs.values()) == {topology.epoch}, "nobody lags behind"
        self.empty -= empty_stages
        self.running = True
        self.repairs.append(is_repair)
        self.resumed.set()


def _run(model: _Model, scenario: Callable[[Repair], Awaitable[None]], patience_s: float = 5.0) -> None:
    async def within() -> None:
        repair = Repair(model, model.replan, patience_s=patience_s)
        running = asyncio.create_task(repair.run())
        waiting = asyncio.create_task(scenario(repair))
        done, _ = await asyncio.wait({running, waiting}, timeout=10, return_when="FIRST_COMPLETED")
        running.cancel()
        waiting.cancel()
        assert done, "the repair hangs"
        for task in done:
            task.result()

    asyncio.run(within())


def _lose_and_wait(model: _Model, *losses: PieceSet) -> Callable[[Repair], Awaitable[None]]:
    async def scenario(repair: Repair) -> None:
        for loss in losses:
            model.lose(loss)
            repair.lost(loss)
        await model.resumed.wait()

    return scenario


def test_one_repair_takes_all_that_is_lost_at_once() -> None:
    model = _Model()
    both = _stages(1, 2) | PieceSet(expert_sets=frozenset({0}))

    _run(model, _lose_and_wait(model, _stages(1), _stages(2), PieceSet(expert_sets=frozenset({0}))))

    assert model.brought_up == [both]
    assert model.running
    assert model.repairs == [True]


def test_what_is_lost_during_a_repair_is_repaired_before_anything_goes_on() -> None:
    model = _Model()

    async def scenario(repair: Repair) -> None:
        def another() -> None:
            model.lose(_stages(3))
            repair.lost(_stages(3))

        model.during_bring_up.append(another)
        await _lose_and_wait(model, _stages(1))(repair)

    _run(model, scenario)

    # The one that was up already is filled as well, but not loaded twice.
    assert model.brought_up == [_stages(1), _stages(3)]
    assert model.empty == set()


def test_a_piece_that_dies_while_it_loads_is_placed_again() -> None:
    model = _Model(unable=[_stages(2)])

    _run(model, _lose_and_wait(model, _stages(1, 2)))

    assert model.brought_up == [_stages(1, 2), _stages(2)]


def test_a_survivor_that_does_not_answer_is_replaced_too() -> None:
    model = _Model(deaf=[_stages(0)])

    _run(model, _lose_and_wait(model, _stages(1)))

    assert model.brought_up == [_stages(1), _stages(0)]


def test_losses_one_after_another_are_repaired_one_after_another() -> None:
    model = _Model()

    async def scenario(repair: Repair) -> None:
        for stage in (0, 3, 1, 1, 2, 0):
            model.completed += 1
            model.resumed.clear()
            await _lose_and_wait(model, _stages(stage))(repair)

    _run(model, scenario)

    assert len(model.brought_up) == 6


def test_room_that_is_reported_a_moment_later_is_waited_for() -> None:
    model = _Model()
    place, asked = model.replan, []

    async def late(loss: PieceSet) -> Topology:
        asked.append(loss)
        if len(asked) < 3:
            raise InsufficientCapacity("not yet")
        return await place(loss)

    model.replan = late  # type: ignore[method-assign]
    _run(model, _lose_and_wait(model, _stages(1)))

    assert len(asked) == 3


_FRESH = _stages(1, 2) | PieceSet(expert_sets=frozenset({1}))
_CHANGE = TopologyChange(builders.topology({"a": (0, 4)}), gone=_FRESH, fresh=_FRESH)


@pytest.mark.parametrize("beside", [_FRESH, PieceSet(), _stages(2)])
def test_a_move_loads_what_was_not_loaded_beside_and_fills_all_that_is_fresh(beside: PieceSet) -> None:
    model = _Model(beside=beside)

    async def scenario(repair: Repair) -> None:
        assert await repair.move(_CHANGE, model.commit)
        assert model.running

    _run(model, scenario)

    assert model.brought_up == [_FRESH - beside]
    assert model.empty == set()
    assert model.repairs == [False], "nothing was lost"


def test_a_move_is_given_up_for_a_loss_and_what_is_lost_is_repaired() -> None:
    model = _Model(beside=_FRESH)

    async def scenario(repair: Repair) -> None:
        moving = asyncio.create_task(repair.move(_CHANGE, model.commit))
        await asyncio.sleep(0)
        model.lose(_stages(3))
        repair.lost(_stages(3))
        assert not await moving
        await model.resumed.wait()

    _run(model, scenario)

    assert model.brought_up == [_stages(3)]
    assert model.beside == _FRESH, "nobody took it"


def test_what_is_lost_during_a_move_is_repaired_where_it_is_then() -> None:
    model = _Model()

    async def scenario(repair: Repair) -> None:
        def another() -> None:
            model.lose(_stages(3))
            repair.lost(_stages(3))

        model.during_bring_up.append(another)
        assert await repair.move(_CHANGE, model.commit)

    _run(model, scenario)

    assert model.brought_up == [_FRESH, _stages(3)]
    assert model.empty == set()
    assert model.repairs == [True]


def test_whoever_repairs_is_not_asked_to_move() -> None:
    model = _Model(unable=[_stages(1)])  # the repair takes two rounds

    async def scenario(repair: Repair) -> None:
        refused: list[asyncio.Task[bool]] = []
        model.during_bring_up.append(
            lambda: refused.append(asyncio.create_task(repair.move(_CHANGE, model.commit)))
        )
        await _lose_and_wait(model, _stages(1))(repair)
        assert not await refused[0]

    _run(model, scenario)


def test_a_repair_that_finds_no_room_gives_up_and_says_so() -> None:
    model = _Model()

    async def full(loss: PieceSet) -> Topology:
        raise InsufficientCapacity("5 bytes are missing")

    model.replan = full  # type: ignore[method-assign]
    with pytest.raises(InsufficientCapacity, match="5 bytes"):
        _run(model, _lose_and_wait(model, _stages(1)), patience_s=0.3)

    assert not model.running


def test_pieces_that_never_come_up_end_the_repair() -> None:
    model = _Model(unable=[_stages(1)] * 10)

    with pytest.raises(WorkerLost, match="stage 1"):
        _run(model, _lose_and_wait(model, _stages(1)))


def test_a_step_that_kills_whoever_runs_it_is_not_tried_for_ever() -> None:
    model = _Model()

    async def scenario(repair: Repair) -> None:
        while True:
            model.resumed.clear()
            await _lose_and_wait(model, _stages(1))(repair)

    with pytest.raises(WorkerLost, match="without a step"):
        _run(model, scenario)
