"""Models move to better places when there are some, each at most once in a while."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from azu.lifecycle.deployed import DeployedModel
from azu.protocol.topology import PipelineKey


class Movable(Protocol):
    """The deployed models, and how one of them finds a better place."""

    @property
    def models(self) -> tuple[DeployedModel, ...]:
        """Those that are up."""

    async def improve(self, model: DeployedModel) -> bool:
        """Move a model if that is worth it; say whether it was tried."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """The epoch that a model had, and since when."""

    epoch: int
    since_s: float


class Moving:
    """Looks now and then whether models would gain from other places, and moves one after another.

    A model that came up, was repaired or moved, or whose move came to nothing, is left alone for `rest_s`:
    nodes that come and go must not have pieces wander with them. The clock is in seconds.
    """

    def __init__(self, fleet: Movable, *, rest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet = fleet
        self._rest_s = rest_s
        self._clock = clock
        self._seen: dict[PipelineKey, _Seen] = {}

    async def look(self) -> None:
        """Move who has rested and gains."""
        for model in self._fleet.models:
            if not model.broken and self._has_rested(model) and await self._fleet.improve(model):
                self._see(model)

    def _has_rested(self, model: DeployedModel) -> bool:
        seen = self._seen.get(model.topology.key)
        if seen is None or seen.epoch != model.topology.epoch:
            seen = self._see(model)
        return self._clock() - seen.since_s >= self._rest_s

    def _see(self, model: DeployedModel) -> _Seen:
        self._seen[model.topology.key] = seen = _Seen(model.topology.epoch, self._clock())
        return seen
