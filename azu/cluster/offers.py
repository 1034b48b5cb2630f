"""What machines that may join would hold: callers need no key, so one plan runs at a time; none waits."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from azu.errors import Unavailable
from azu.planner.node_pool import rounded
from azu.protocol.node import Node
from azu.supervision import as_known_error

_WAIT_S = 5.0
_KEPT_DEVICES = 64

Layers = Mapping[str, tuple[int, int]]  # model id -> (its layers on the machine, all of its layers)


class Offers:
    """Asks `would_hold` about one machine at a time, and keeps the last answers by kind of device."""

    def __init__(self, would_hold: Callable[[Node], Awaitable[Layers]], *, wait_s: float = _WAIT_S) -> None:
        self._would_hold = would_hold
        self._wait_s = wait_s
        self._planning: asyncio.Task[Layers] | None = None
        self._last: dict[tuple[float, ...], Layers] = {}  # the oldest first

    async def layers(self, node: Node) -> Layers:
        """Return what a node would hold, while another is planned the last answer for such a device.

        Raises Unavailable where there is none, and where the plan takes long; it is kept for later callers.
        """
        sizes = node.vram_total_bytes, node.memory_bytes_per_s, node.flops_per_s
        device = tuple(map(rounded, sizes))
        if self._planning is not None and not self._planning.done():
            if (last := self._last.get(device)) is not None:
                return last
            raise Unavailable("what another machine would hold is planned now", retry_after_s=self._wait_s)
        self._planning = asyncio.create_task(self._plan(device, node))
        self._planning.add_done_callback(_told)
        try:
            # A plan's thread cannot be ended: the next plan waits until it is done.
            async with asyncio.timeout(self._wait_s):
                return await asyncio.shield(self._planning)
        except TimeoutError:
            raise Unavailable("the plan takes long", retry_after_s=self._wait_s) from None

    async def _plan(self, device: tuple[float, ...], node: Node) -> Layers:
        found = await self._would_hold(node)
        self._last.pop(device, None)
        self._last[device] = found
        if len(self._last) > _KEPT_DEVICES:
            del self._last[next(iter(self._last))]
        return found


def _told(planning: asyncio.Task[Layers]) -> None:
    """Log the error of a plan whose caller may have gone."""
    if not planning.cancelled() and isinstance(error := planning.exception(), Exception):
        as_known_error(error, "a plan for a machine that may join")
