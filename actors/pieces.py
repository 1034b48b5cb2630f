"""The pieces of one deployed model: stages and expert sets on their nodes, watched while they live."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any

from ray.actor import ActorHandle

from actors.piece import Neighbours, RayPiece
from actors.seat import PipelineSeat
from actors.site import Site
from azu.errors import AzuError
from azu.lifecycle.placements import placements
from azu.lifecycle.standing import StandingPiece
from azu.planner.hot_experts import Counts
from azu.protocol.job import Placement
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, Loss, Stage, Topology
from azu.recovery.keys import Key, key_of, keys_of, loss_of

log = logging.getLogger(__name__)

Step = Callable[[RayPiece], Coroutine[Any, Any, None]]


class RayPieces:
    """Brings pieces up and down, and says which are lost; one model's, behind one pipeline.

    `lost` is called with what dies after it came up, `resumed` with every topology that runs.
    """

    def __init__(
        self,
        site: Site,
        structure: Structure,
        seat: PipelineSeat,
        *,
        lost: Callable[[Loss], None],
        resumed: Callable[[Topology], Awaitable[None]],
    ) -> None:
        self._site = site
        self._structure = structure
        self._seat = seat
        self._lost = lost
        self._resumed = resumed
        self._pieces: dict[Key, RayPiece] = {}
        self._beside: dict[Key, RayPiece] = {}

    def placements(self) -> tuple[Placement, ...]:
        """Return the receipt's lines: which node runs what in which actor."""
        return placements(((piece.what, piece.name) for piece in self._pieces.values()), self._site.nodes)

    def standing(self) -> tuple[StandingPiece, ...]:
        """Return the pieces as they are written down."""
        return tuple(
            StandingPiece(kind is Stage, index, piece.epoch, piece.name)
            for (kind, index), piece in self._pieces.items()
        )

    async def adopt(self, topology: Topology, standing: Iterable[StandingPiece]) -> Loss:
        """Find pieces that somebody else brought up; return those that are gone."""
        whats = {key_of(what): what for what in topology.pieces}
        for one in standing:
            what = whats[Stage if one.is_stage else ExpertSet, one.index]
            piece = RayPiece(self._site, self._structure, what, one.epoch)
            if await piece.found(one.name):
                self._pieces[key_of(what)] = piece
                self._watch(key_of(what))
        return loss_of(whats.keys() - self._pieces.keys())

    async def pause(self) -> int:
        """Have the pipeline wait, whoever is the pipeline by then."""
        return await self._seat.pause()

    async def fence(self, loss: Loss) -> None:
        """Kill what is lost, whether it is dead or only seems so, and give its VRAM back."""
        for key in keys_of(loss):
            if piece := self._pieces.pop(key, None):
                piece.take_down()

    async def prepare(self, topology: Topology, fresh: Loss) -> bool:
        """Bring pieces up beside those that run, for `install`; say whether all came up."""
        self._beside = self._made(topology, fresh)
        errors = await self._up(self._beside, topology, self._pieces | self._beside)
        for key, error in errors.items():
            log.warning("%s was not prepared: %s", loss_of([key]), error.message)
        return not errors

    def install(self) -> Loss:
        """Take what was prepared as the model's; return which pieces these are."""
        installed, self._beside = self._beside, {}
        self._pieces |= installed
        for key in installed:
            self._watch(key)
        return loss_of(installed)

    def discard(self) -> None:
        """Take down what was prepared and not installed."""
        while self._beside:
            self._beside.popitem()[1].take_down()

    async def bring_up(self, topology: Topology, loss: Loss) -> Loss:
        """Bring lost pieces up; return those that it did not work for."""
        errors = await self.try_bring_up(topology, loss)
        for key, error in errors.items():
            log.warning("%s did not come up: %s", loss_of([key]), error.message)
        return loss_of(errors)

    async def try_bring_up(self, topology: Topology, loss: Loss) -> Mapping[Key, AzuError]:
        """Bring pieces up where the topology has them; return what went wrong for which."""
        coming = self._made(topology, loss)
        self._pieces |= coming
        errors = await self._up(coming, topology, self._pieces)
        for key in coming.keys() - errors.keys():
            self._watch(key)
        return errors

    async def relink(self, topology: Topology) -> Loss:
        """Tell every stage its new neighbours that does not know them; return those that did not take it."""
        behind = {
            key: piece
            for key, piece in self._pieces.items()
            if isinstance(piece.what, Stage) and piece.linked_epoch < topology.epoch
        }
        return loss_of(
            await _each(behind, lambda piece: piece.relink(topology, self._neighbours(piece, self._pieces)))
        )

    async def resume(self, topology: Topology, empty_stages: frozenset[int], *, is_repair: bool) -> None:
        """Have the pipeline fill the empty stages and go on."""
        await self._seat.resume(topology, self.stages(), empty_stages, is_repair=is_repair)
        await self._resumed(topology)

    def stages(self) -> list[ActorHandle]:
        """Return the stages in order."""
        found = sorted((key[1], piece.actor) for key, piece in self._pieces.items() if key[0] is Stage)
        return [actor for _, actor in found]

    async def num_chosen(self) -> Counts:
        """Return how often each expert was chosen, in layers that have experts apart from their router."""
        stages = [piece for (kind, _), piece in self._pieces.items() if kind is Stage]
        answers = await asyncio.gather(*(piece.num_chosen() for piece in stages))
        return {layer: counts for answer in answers for layer, counts in answer.items()}

    def still_there(self, loss: Loss, epoch: int) -> Loss:
        """Return what of a loss in an epoch was not replaced since."""
        return loss_of(
            key
            for key in keys_of(loss)
            if (piece := self._pieces.get(key)) is not None and piece.epoch <= epoch
        )

    def nodes_of(self, loss: Loss) -> frozenset[str]:
        """Return the nodes that hold some pieces."""
        return frozenset(self._pieces[key].what.node_id for key in keys_of(loss) if key in self._pieces)

    def node_died(self, node_id: str) -> None:
        """Give up what is on a node, without waiting for its actors to say so."""
        for key, piece in self._pieces.items():
            if piece.what.node_id == node_id and not piece.node_died():
                self._lost(loss_of([key]))
        for piece in self._beside.values():
            if piece.what.node_id == node_id:
                piece.node_died()

    def take_down(self) -> None:
        """Take every piece down and give the VRAM back."""
        self.discard()
        while self._pieces:
            _, piece = self._pieces.popitem()
            piece.take_down()

    def _made(self, topology: Topology, loss: Loss) -> dict[Key, RayPiece]:
        return {
            key_of(what): RayPiece(self._site, self._structure, what, topology.epoch)
            for what in topology.pieces
            if key_of(what) in keys_of(loss)
        }

    async def _up(
        self, coming: Mapping[Key, RayPiece], topology: Topology, among: Mapping[Key, RayPiece]
    ) -> dict[Key, AzuError]:
        """Bring pieces up whose neighbours are `among` some; return what went wrong for which."""
        errors = await _each(coming, RayPiece.start)
        started = {key: piece for key, piece in coming.items() if key not in errors}
        return errors | await _each(
            started, lambda piece: piece.load(topology, self._neighbours(piece, among))
        )

    def _watch(self, key: Key) -> None:
        self._pieces[key].watch(lambda: self._lost(loss_of([key])))

    def _neighbours(self, piece: RayPiece, among: Mapping[Key, RayPiece]) -> Neighbours:
        expert_sets = {key[1]: one.actor for key, one in among.items() if key[0] is ExpertSet}
        after = among.get((Stage, piece.what.index + 1))
        return Neighbours(expert_sets, after.actor if after else None, self._seat.actor)


async def _each(pieces: Mapping[Key, RayPiece], step: Step) -> dict[Key, AzuError]:
    """Take a step with several pieces at once; return the errors of those it failed for."""
    errors = await asyncio.gather(*(piece.attempt(step(piece)) for piece in pieces.values()))
    return {key: error for key, error in zip(pieces, errors, strict=True) if error is not None}
