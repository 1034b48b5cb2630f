"""Models that changed lately are left alone for a while."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from azu.lifecycle.deployed import DeployedModel
from azu.protocol.topology import PipelineKey


@dataclass(frozen=True, slots=True)
class _Seen:
    """The epoch that a model had, and since when."""

    epoch: int
    since_s: float


class Rest:
    """Who came up, was repaired or moved rests for `rest_s`, and so does whose change came to nothing.

    Nodes that come and go must not have pieces wander with them. The clock is in seconds.
    """

    def __init__(self, rest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rest_s = rest_s
        self._clock = clock
        self._seen: dict[PipelineKey, _Seen] = {}

    def is_over(self, model: DeployedModel) -> bool:
        """Say whether a model has rested; it begins to when its epoch is seen first."""
        seen = self._seen.get(model.topology.key)
        if seen is None or seen.epoch != model.topology.epoch:
            self.begin(model)
        return self._clock() - self._seen[model.topology.key].since_s >= self._rest_s

    def begin(self, model: DeployedModel) -> None:
        """Have a model rest from now on."""
        self._seen[model.topology.key] = _Seen(model.topology.epoch, self._clock())
