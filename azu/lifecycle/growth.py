"""When the network is short of room: what is asked of whoever adds nodes, and until when."""

import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from azu.errors import AzuError, InsufficientCapacity
from azu.lifecycle.dispatch import Deployments, RunningModel
from azu.units import MIB

log = logging.getLogger(__name__)

# Asks for nodes that together hold some bundles, each of whole MiB on one node, those there are included;
# the last request stands until the next. Raises an AzuError when nobody heard.
Ask = Callable[[tuple[int, ...]], Awaitable[None]]


class Growth:
    """Brings models up as `deployments` does, and asks for what the jobs lack that it has no room for.

    It is withdrawn when none waits any more; what a model lacks is forgotten `patience_s` after it was tried
    last. The clock is in seconds.
    """

    def __init__(
        self,
        deployments: Deployments,
        ask: Ask,
        *,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deployments = deployments
        self._ask = ask
        self._patience_s = patience_s
        self._clock = clock
        self._missing: dict[str, tuple[tuple[int, ...], float]] = {}  # by model: bytes, when it was tried
        # Whoever was here before may have asked for something.
        self._asked: tuple[int, ...] | None = None

    @property
    def is_short(self) -> bool:
        """Whether jobs wait that found no room."""
        return bool(self._missing)

    async def ensure(self, model_id: str, revision: str, job_id: str) -> RunningModel:
        """Return the running model, or remember what it lacks."""
        try:
            model = await self._deployments.ensure(model_id, revision, job_id)
        except InsufficientCapacity as error:
            self._missing[model_id] = (error.missing_bytes, self._clock())
            raise
        self._missing.pop(model_id, None)
        return model

    async def look(self, lent_bytes: Iterable[int], num_waiting: int) -> None:
        """Ask for what is lacking now, once; `lent_bytes` is what each node lends, used or not."""
        bundles = self._bundles(lent_bytes, num_waiting)
        if bundles == self._asked:
            return
        try:
            await self._ask(bundles)
        except AzuError as error:
            log.warning("nobody was asked for nodes: %s", error.message)
            return
        if bundles or self._asked:
            log.warning("asked for nodes that hold %s MiB of VRAM", list(bundles) or "no")
        self._asked = bundles

    def _bundles(self, lent_bytes: Iterable[int], num_waiting: int) -> tuple[int, ...]:
        now_s = self._clock()
        self._missing = {
            model_id: (missing, tried_s)
            for model_id, (missing, tried_s) in self._missing.items()
            if num_waiting and now_s - tried_s < self._patience_s
        }
        missing = sorted(size for sizes, _ in self._missing.values() for size in sizes)
        if not missing:
            return ()
        # What is asked for is compared with all that nodes lend: what they lend already comes on top.
        lent = sorted(size // MIB for size in lent_bytes)
        return (*lent, *(-(-size // MIB) for size in missing))
