"""Hot experts are held twice while there is room that nobody needs."""

from typing import Protocol

from azu.lifecycle.deployed import DeployedModel
from azu.lifecycle.rest import Rest
from azu.planner.hot_experts import Counts, Heat, heat_of
from azu.protocol.topology import PipelineKey

# Of so few choices one expert has more than another by chance.
_LEAST_CHOICES = 1_000


class Replicable(Protocol):
    """The deployed models, and how one of them gets the replicas that it is to have."""

    @property
    def models(self) -> tuple[DeployedModel, ...]:
        """Those that are up."""

    async def replicate(self, model: DeployedModel, heat: Heat) -> bool:
        """Have a model hold its hot experts twice, and no others; say whether a change was tried."""


class Replicating:
    """Looks now and then which experts are chosen more than others, one model after another.

    Heat is of what was chosen since the last look at which enough was. Nobody keeps a replica while jobs find
    no room.
    """

    def __init__(self, fleet: Replicable, rest: Rest, *, least_choices: int = _LEAST_CHOICES) -> None:
        self._fleet = fleet
        self._rest = rest
        self._least_choices = least_choices
        self._counts: dict[PipelineKey, Counts] = {}

    async def look(self, *, is_short: bool) -> None:
        """Give hot experts their replicas, or take all of them back when there `is_short` room."""
        for model in self._fleet.models:
            if model.broken or not model.topology.expert_sets:
                continue
            if is_short:
                await self._fleet.replicate(model, {})
                continue
            heat = await self._heat(model) if self._rest.is_over(model) else {}
            if heat and await self._fleet.replicate(model, heat):
                self._rest.begin(model)

    async def _heat(self, model: DeployedModel) -> Heat:
        key = model.topology.key
        counts = await model.num_chosen()
        heat = heat_of(self._counts.get(key, {}), counts, least_choices=self._least_choices)
        if heat:
            self._counts[key] = counts
        return heat
