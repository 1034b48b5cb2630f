"""Models move to better places when there are some, each at most once in a while."""

from typing import Protocol

from azu.lifecycle.deployed import DeployedModel
from azu.lifecycle.rest import Rest


class Movable(Protocol):
    """The deployed models, and how one of them finds a better place."""

    @property
    def models(self) -> tuple[DeployedModel, ...]:
        """Those that are up."""

    async def improve(self, model: DeployedModel) -> bool:
        """Move a model if that is worth it; say whether it was tried."""


class Moving:
    """Looks now and then whether models would gain from other places, and moves one after another."""

    def __init__(self, fleet: Movable, rest: Rest) -> None:
        self._fleet = fleet
        self._rest = rest

    async def look(self) -> None:
        """Move who has rested and gains."""
        for model in self._fleet.models:
            if not model.broken and self._rest.is_over(model) and await self._fleet.improve(model):
                self._rest.begin(model)
