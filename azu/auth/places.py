"""Requests that are open at once: one too many would wait behind the others without an answer."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType

from azu.errors import RateLimited, Unavailable

# Requests that are answered at once, with little.
QUICK = ("/v1/platform", "/v1/balance", "/v1/earnings", "/v1/network", "/v1/models", "/models/status")
QUICK_BELOW = "/v1/auth/"
# Requests that wait for the chain, for the Hub or for another machine.
WAITING = ("/deposit", "/submit", "/v1/quote", "/v1/models/", "/v1/withdrawals", "/v1/nodes/")
# The places of each kind of requests in the reverse proxy. Of requests that only compute few are there at
# once, or the health would wait behind all of them.
PLACES = MappingProxyType({"quick": 32, "short": 64, "waiting": 256, "answers": 1792})
# Those of one owner: it leaves some to others, also while what it asked for stands still.
OF_ONE = MappingProxyType({"quick": 24, "short": 48, "waiting": 192, "answers": 512})
_BUSY_S = 1.0
# Many requests of one owner at once are each answered soon: one waits so often for another's place.
_LOOKS, _LOOK_S = 25, 0.01


def kind_of(path: str) -> str:
    """Return the kind of a request that is not for an answer."""
    if path in QUICK or path.startswith(QUICK_BELOW):
        return "quick"
    return "waiting" if path.startswith(WAITING) else "short"


class Places:
    """The places of requests; each owner has only some of those of each kind."""

    def __init__(self, most: int, of_one: Mapping[str, int] = OF_ONE) -> None:
        self._most = most
        self._of_one = of_one
        self._taken: Counter[tuple[str, str]] = Counter()

    @asynccontextmanager
    async def place(self, owner: str, kind: str) -> AsyncIterator[None]:
        """Hold a place during the block; raises RateLimited or Unavailable where none is free soon."""
        own, most = (owner, kind), self._of_one[kind]
        looks = _LOOKS
        while self._taken[own] >= most:
            if not looks:
                raise RateLimited(
                    f"{most} such requests of this account are open; wait until one has ended",
                    code="too_many_open_requests",
                    retry_after_s=_BUSY_S,
                )
            looks -= 1
            await asyncio.sleep(_LOOK_S)
        if self._taken.total() >= self._most:
            raise Unavailable("too many requests are open", code="overloaded", retry_after_s=_BUSY_S)
        self._taken[own] += 1
        try:
            yield
        finally:
            self._taken[own] -= 1
            if not self._taken[own]:
                del self._taken[own]
