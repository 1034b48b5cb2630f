"""The actors of a deployment's pieces: started, loaded, linked, watched and killed by name."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from azu.cluster.backend import DeploymentBackend, Neighbours
from azu.cluster.deployment_store import PieceRecord
from azu.cluster.liveness import SLOW_FACTOR, PieceWatch, Pulse, relative_slowdowns
from azu.cluster.phases import on_nodes
from azu.errors import AzuError, InternalError, WorkerLost
from azu.planner.replicas import ExpertCounts
from azu.protocol.job import Placement, node_ids, placements
from azu.protocol.phase import JobPhase
from azu.protocol.step import PieceProgress
from azu.protocol.structure import Structure
from azu.protocol.topology import (
    ExpertSet,
    Piece,
    PieceKey,
    PieceSet,
    Stage,
    Topology,
    actor_name,
    key_of,
    keys_of,
    piece_set,
)
from azu.supervision import as_known_error

log = logging.getLogger(__name__)

_LOOK_S = 1.0


@dataclass(slots=True)
class _PieceActor:
    """The actor of a stage or an expert set.

    `epoch` is the one that it was started under, `linked_epoch` that of the neighbours that it has.
    """

    piece: Piece
    name: str
    epoch: int
    linked_epoch: int
    starting: asyncio.Task[None] | None = None
    watcher: asyncio.Task[None] | None = None
    watch: PieceWatch | None = None
    pulse: Pulse = Pulse.STEADY
    is_loaded: bool = False

    @property
    def slowdown(self) -> float:
        """How many times as long as the quickest ones its recent steps take."""
        return 1.0 if self.watch is None else self.watch.slowdown

    def stop_starting(self) -> bool:
        """Fail the step of its start that is under way; False when none is."""
        return self.starting is not None and self.starting.cancel()


class PieceActors:
    """The actors that there are, by piece; `on_lost` is called with a piece whose actor dies or hangs.

    Actors that were prepared for a change stand beside the running ones until they are installed. The clock
    is in seconds. For pieces that are being replaced, nodes that are not `avoided` come first.
    """

    def __init__(
        self,
        backend: DeploymentBackend,
        structure: Structure,
        on_lost: Callable[[PieceSet], None],
        clock: Callable[[], float],
    ) -> None:
        self._backend = backend
        self._structure = structure
        self._on_lost = on_lost
        self._clock = clock
        self.avoided: set[str] = set()
        self._running: dict[PieceKey, _PieceActor] = {}
        self._prepared: dict[PieceKey, _PieceActor] = {}

    @property
    def stages(self) -> list[str]:
        """The names of the stages' actors, in order."""
        found = sorted((index, actor.name) for (kind, index), actor in self._running.items() if kind is Stage)
        return [name for _, name in found]

    @property
    def expert_sets(self) -> dict[int, str]:
        """The names of the expert sets' actors, by index."""
        return {index: actor.name for (kind, index), actor in self._running.items() if kind is ExpertSet}

    def phase(self, topology: Topology, *, is_repair: bool) -> JobPhase:
        """Return how far the start or the repair of a topology's pieces is."""
        loaded = {key for key, actor in self._running.items() if actor.is_loaded}
        return on_nodes(self._structure, topology, self._backend.nodes, loaded, is_repair=is_repair)

    def records(self) -> tuple[PieceRecord, ...]:
        """Return what the next scheduler needs in order to find the actors."""
        return tuple(
            PieceRecord(kind is Stage, index, actor.epoch, actor.name)
            for (kind, index), actor in self._running.items()
        )

    def placements(self) -> tuple[Placement, ...]:
        """Return the receipt's lines: which node runs which layers and experts in which actor."""
        return placements(((one.piece, one.name) for one in self._running.values()), self._backend.nodes)

    def node_ids(self) -> tuple[str, ...]:
        """Return the ids of the nodes of `placements`, in the same order."""
        return node_ids(one.piece for one in self._running.values())

    @property
    def is_slow(self) -> bool:
        """Whether a piece comes on much slower than it did before."""
        actors = self._running.values()
        return any(one.pulse is Pulse.SLOW or one.slowdown >= SLOW_FACTOR for one in actors)

    @property
    def is_computing(self) -> bool:
        """Whether a piece is in a step."""
        return any(one.watch is not None and one.watch.is_computing for one in self._running.values())

    def slow_factors(self) -> dict[str, float]:
        """Return the factor by which each node is slowed down more than the others are."""
        slowdowns = {key: actor.slowdown for key, actor in self._running.items()}
        factors: dict[str, float] = {}
        for key, factor in relative_slowdowns(slowdowns).items():
            node_id = self._running[key].piece.node_id
            factors[node_id] = max(factor, factors.get(node_id, 1.0))
        return factors

    async def num_chosen(self) -> ExpertCounts:
        """Return how often each expert was chosen, in layers that have experts apart from their router."""
        answers = await asyncio.gather(*(self._backend.num_chosen(name) for name in self.stages))
        return {layer: counts for answer in answers for layer, counts in answer.items()}

    def not_replaced(self, pieces: PieceSet, epoch: int) -> PieceSet:
        """Return those of some pieces whose actors were started under this epoch or an older one."""
        return piece_set(
            key
            for key in keys_of(pieces)
            if (actor := self._running.get(key)) is not None and actor.epoch <= epoch
        )

    def missing(self, topology: Topology) -> PieceSet:
        """Return the pieces of a topology that have no actor."""
        return topology.piece_set - piece_set(self._running)

    def nodes_of(self, pieces: PieceSet) -> list[str]:
        """Return the ids of the nodes that hold some running pieces."""
        return sorted({self._running[key].piece.node_id for key in keys_of(pieces)})

    async def adopt(self, topology: Topology, records: Sequence[PieceRecord]) -> PieceSet:
        """Find the actors that another scheduler started; return the pieces whose actors are gone.

        After an error this may be called again.
        """
        pieces = {key_of(piece): piece for piece in topology.pieces}
        for record in records:
            key: PieceKey = (Stage if record.is_stage else ExpertSet, record.index)
            if key not in self._running and await self._backend.find(record.name):
                self._running[key] = _PieceActor(
                    pieces[key], record.name, record.epoch, record.epoch, is_loaded=True
                )
                self._watch(key)
        return piece_set(pieces.keys() - self._running.keys())

    async def bring_up(self, topology: Topology, pieces: PieceSet, pipeline: str) -> dict[PieceKey, AzuError]:
        """Start and load pieces where the topology has them; return the errors of those that failed."""
        coming = self._new(topology, pieces)
        self._running |= coming
        errors = await self._start_and_load(coming, topology, self._running, pipeline)
        for key in coming.keys() - errors.keys():
            self._watch(key)
        return errors

    async def fetch(self, topology: Topology, fresh: PieceSet) -> bool:
        """Fetch what pieces need to their nodes, which run them later; say whether all of it came."""
        coming = self._new(topology, fresh)
        errors = await _each(coming, lambda one: self._backend.fetch(one.name, one.piece, self._structure))
        for key, error in errors.items():
            log.warning("%s cannot be fetched: %s", piece_set([key]), error.message)
        return not errors

    async def prepare(self, topology: Topology, fresh: PieceSet, pipeline: str) -> bool:
        """Start and load pieces beside those that run, for `install`; say whether all came up."""
        self._prepared = self._new(topology, fresh)
        among = self._running | self._prepared
        return not await self._start_and_load(self._prepared, topology, among, pipeline)

    def install(self) -> PieceSet:
        """Take the prepared actors as the running ones; return which pieces these are."""
        installed, self._prepared = self._prepared, {}
        self._running |= installed
        for key in installed:
            self._watch(key)
        return piece_set(installed)

    def discard_prepared(self) -> None:
        """Kill what was prepared and not installed."""
        self._kill(self._prepared)

    async def link(self, topology: Topology, pipeline: str) -> PieceSet:
        """Give every stage its neighbours that has those of an older epoch; return those that failed."""

        async def link(actor: _PieceActor) -> None:
            neighbours = self._neighbours(actor.piece, self._running, pipeline)
            linking = asyncio.ensure_future(self._backend.link(actor.name, topology, neighbours))
            assert actor.watcher is not None, "what runs is watched"
            try:
                # A slow stage ends its step first.
                await asyncio.wait({linking, actor.watcher}, return_when=asyncio.FIRST_COMPLETED)
                if not linking.done():
                    raise WorkerLost(f"{actor.name} is gone")
                linking.result()
            finally:
                linking.cancel()
            actor.linked_epoch = topology.epoch

        behind = {
            key: actor
            for key, actor in self._running.items()
            if isinstance(actor.piece, Stage) and actor.linked_epoch < topology.epoch
        }
        return piece_set(await _each(behind, link))

    def fence(self, lost: PieceSet) -> None:
        """Kill what is lost, whether it is dead or only seems so, and give its VRAM back."""
        self._kill({key: self._running.pop(key) for key in keys_of(lost) if key in self._running})

    def node_lost(self, node_id: str) -> PieceSet:
        """Return the pieces that ran on a node; the starts that are under way there fail at once."""
        lost = []
        for key, actor in self._running.items():
            if actor.piece.node_id == node_id and not actor.stop_starting():
                lost.append(key)
                if actor.watcher is not None:
                    actor.watcher.cancel()  # what waits for it waits no longer
        for actor in self._prepared.values():
            if actor.piece.node_id == node_id:
                actor.stop_starting()
        return piece_set(lost)

    def close(self) -> None:
        """Kill every actor."""
        self._kill(self._prepared)
        self._kill(self._running)

    def _new(self, topology: Topology, pieces: PieceSet) -> dict[PieceKey, _PieceActor]:
        actors = {}
        for piece in topology.pieces:
            if key_of(piece) in keys_of(pieces):
                kind = "layer" if isinstance(piece, Stage) else "expert"
                name = actor_name(kind, self._structure.model_id, topology.epoch, piece.index)
                actors[key_of(piece)] = _PieceActor(piece, name, topology.epoch, topology.epoch)
        return actors

    async def _start_and_load(
        self,
        coming: Mapping[PieceKey, _PieceActor],
        topology: Topology,
        among: Mapping[PieceKey, _PieceActor],
        pipeline: str,
    ) -> dict[PieceKey, AzuError]:
        """Start actors, then load those that started; their neighbours are `among` some actors."""

        async def load(actor: _PieceActor) -> None:
            neighbours = self._neighbours(actor.piece, among, pipeline)
            await self._backend.load(actor.name, actor.piece, self._structure, topology, neighbours)
            actor.is_loaded = True

        errors = await _each(coming, lambda actor: self._backend.start(actor.name, actor.piece))
        errors |= await _each({key: actor for key, actor in coming.items() if key not in errors}, load)
        for key, error in errors.items():
            log.warning("%s did not come up: %s", piece_set([key]), error.message)
        return errors

    def _watch(self, key: PieceKey) -> None:
        """Notice from now on when the actor of a piece dies or hangs."""
        actor = self._running[key]
        actor.watcher = asyncio.create_task(self._report_end(key, actor))

    async def _report_end(self, key: PieceKey, actor: _PieceActor) -> None:
        while True:
            try:
                await self._follow(actor, PieceWatch(self._clock()))
            except AzuError as error:
                log.warning("%s", error.message)
                self._on_lost(piece_set([key]))
                return
            except Exception as error:
                as_known_error(error, f"the watch of {actor.name}")
                await asyncio.sleep(_LOOK_S)

    async def _follow(self, actor: _PieceActor, watch: PieceWatch) -> None:
        """Follow how an actor comes on; raises WorkerLost once it dies or hangs."""
        actor.watch = watch
        asking: asyncio.Future[PieceProgress] | None = None
        try:
            while actor.pulse is not Pulse.HUNG:
                asking = asking or asyncio.ensure_future(self._backend.ping(actor.name, actor.piece))
                await asyncio.wait({asking}, timeout=_LOOK_S)
                now_s = self._clock()
                if asking.done():
                    watch.answered(asking.result(), now_s)
                    asking = None
                if (pulse := watch.judge(now_s)) is not actor.pulse:
                    log.warning("%s was %s and is %s", actor.name, actor.pulse, pulse)
                    actor.pulse = pulse
        finally:
            if asking is not None:
                asking.cancel()
        self.avoided.add(actor.piece.node_id)
        raise WorkerLost(f"{actor.name} has not come on for {watch.bound_s:.0f} s")

    def _kill(self, actors: dict[PieceKey, _PieceActor]) -> None:
        while actors:
            _, actor = actors.popitem()
            if actor.watcher is not None:
                actor.watcher.cancel()
            self._backend.kill(actor.name)

    def _neighbours(self, piece: Piece, among: Mapping[PieceKey, _PieceActor], pipeline: str) -> Neighbours:
        expert_sets = {key[1]: actor.name for key, actor in among.items() if key[0] is ExpertSet}
        after = among.get((Stage, piece.index + 1))
        return Neighbours(expert_sets, after.name if after else None, pipeline)


async def _each(
    actors: Mapping[PieceKey, _PieceActor], step: Callable[[_PieceActor], Coroutine[Any, Any, None]]
) -> dict[PieceKey, AzuError]:
    """Take a step with several actors at once; return the errors of those that it failed for."""
    errors = await asyncio.gather(*(_attempt(actor, step(actor)) for actor in actors.values()))
    return {key: error for key, error in zip(actors, errors, strict=True) if error is not None}


async def _attempt(actor: _PieceActor, step: Coroutine[Any, Any, None]) -> AzuError | None:
    """Take one step with an actor and return its error; `stop_starting` ends the step."""
    actor.starting = asyncio.create_task(step)
    try:
        (result,) = await asyncio.gather(actor.starting, return_exceptions=True)
    finally:
        actor.starting = None
    if isinstance(result, asyncio.CancelledError):
        return WorkerLost(f"the node of {actor.name} died")
    if result is None or isinstance(result, AzuError):
        return result
    if isinstance(result, Exception):
        return InternalError(f"{actor.name} failed: {type(result).__name__}: {result}")
    raise result
