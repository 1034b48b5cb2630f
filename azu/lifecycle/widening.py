"""A model that more jobs ask for than it has room for gets another pipeline while nodes have some."""

import logging
from collections import defaultdict
from typing import Protocol

from azu.errors import AzuError
from azu.lifecycle.deployed import DeployedModel

log = logging.getLogger(__name__)


class Widenable(Protocol):
    """The deployed pipelines, and how a model gets one more."""

    @property
    def models(self) -> tuple[DeployedModel, ...]:
        """The pipelines that are up."""

    async def widen(self, model_id: str, revision: str) -> None:
        """Bring up one more pipeline of a model, where there are nodes for it."""


class Widening:
    """Looks now and then which models are busy: each pipeline has more jobs than `promised_sequences`.

    Who is busy at two looks, one after the other, gets another pipeline. One that is idle again makes room
    when another model needs it, as every idle model does.
    """

    def __init__(self, fleet: Widenable, promised_sequences: int) -> None:
        self._fleet = fleet
        self._promised_sequences = promised_sequences
        self._were_busy: set[tuple[str, str]] = set()

    async def look(self) -> None:
        """Widen who stays busy."""
        busy = self._busy()
        for model_id, revision in sorted(busy & self._were_busy):
            try:
                await self._fleet.widen(model_id, revision)
            except AzuError as error:
                log.warning("%s did not get another pipeline: %s", model_id, error.message)
        self._were_busy = busy

    def _busy(self) -> set[tuple[str, str]]:
        fewest: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        for model in self._fleet.models:
            if not model.broken:
                fewest[model.topology.key[:2]].append(model.running_jobs)
        return {model for model, jobs in fewest.items() if min(jobs) > self._promised_sequences}
