"""What each owner lent and earned in the last days: who earned little for it comes first in plans."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pydantic import ConfigDict, TypeAdapter, ValidationError

from azu.protocol.node import Node, NodeState
from azu.units import GIB

log = logging.getLogger(__name__)

# After so long what was lent and earned counts half.
_HALF_LIFE_S = 2 * 86_400.0
# Of a longer time between two looks it is not known who lent.
_LONGEST_LOOK_S = 600.0
# For an owner who lent little the mean of all counts as if it were earned for so long. Until it has lent what
# it lends now for so long, it comes behind those who lent for longer: a new address gains nothing by it.
_NEWCOMER_H = 24
# An owner with less is forgotten.
_LEAST_GIB_H = 0.01
_HOUR_S = 3600.0


@dataclass(slots=True)
class _Sums:
    """Of `ever_gib_h` old parts count in full: who lends for a few hours each day is not new for ever."""

    gib_h: float = 0.0
    lamports: float = 0.0
    ever_gib_h: float = 0.0


@dataclass(slots=True)
class OwnersEarnings:
    """The sums by owner (payout address), of which older parts count less.

    The clock is the caller's, in seconds.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    by_owner: dict[str, _Sums] = field(default_factory=dict)
    looked_s: float | None = None

    def lend(self, nodes: Iterable[Node], now_s: float) -> None:
        """Take which nodes lend now; called again and again."""
        passed_s = 0.0 if self.looked_s is None else max(0.0, now_s - self.looked_s)
        self.looked_s = now_s
        left = 0.5 ** (passed_s / _HALF_LIFE_S)
        for sums in self.by_owner.values():
            sums.gib_h *= left
            sums.lamports *= left
        hours, lent = min(passed_s, _LONGEST_LOOK_S) / _HOUR_S, _lent_gib(nodes)
        for owner, gib in lent.items():
            sums = self.by_owner.setdefault(owner, _Sums())
            sums.gib_h += gib * hours
            sums.ever_gib_h += gib * hours
        self.by_owner = {
            owner: sums
            for owner, sums in self.by_owner.items()
            if owner in lent or sums.gib_h >= _LEAST_GIB_H
        }

    def earn(self, lamports_by_owner: Mapping[str, int]) -> None:
        """Take what owners earned with a job; an owner who did not lend is left out."""
        for owner, lamports in lamports_by_owner.items():
            if (sums := self.by_owner.get(owner)) is not None:
                sums.lamports += lamports

    @property
    def mean(self) -> float:
        """Lamports that all owners together earned for each GiB lent for an hour."""
        lent = sum(sums.gib_h for sums in self.by_owner.values())
        return sum(sums.lamports for sums in self.by_owner.values()) / lent if lent else 0.0

    def rates(self, nodes: Iterable[Node]) -> dict[str, float]:
        """Return the lamports for each GiB and hour of each owner that lends now.

        That of a newcomer is at least the highest of those who lent for hours longer.
        """
        rates, hours, mean = {}, {}, self.mean
        highest = [0.0] * (_NEWCOMER_H + 1)  # of the owners who lent for so many hours, the last also longer
        for owner, gib in _lent_gib(nodes).items():
            sums, average_gib_h = self.by_owner.get(owner, _Sums()), _NEWCOMER_H * gib
            rate = (sums.lamports + mean * average_gib_h) / (sums.gib_h + average_gib_h)
            hour = min(_NEWCOMER_H, int(sums.ever_gib_h / gib))
            rates[owner], hours[owner], highest[hour] = rate, hour, max(highest[hour], rate)
        return {owner: max([rate, *highest[hours[owner] + 1 :]]) for owner, rate in rates.items()}

    def to_json(self) -> str:
        """Return the sums for the next scheduler, whose clock is another."""
        return _SUMS.dump_json(self.by_owner).decode()

    @classmethod
    def from_json(cls, text: str) -> "OwnersEarnings":
        """Return the sums of before; a text that cannot be read begins anew."""
        try:
            return cls(_SUMS.validate_json(text))
        except ValidationError as error:
            log.warning("what owners earned cannot be read and is counted anew: %s", error)
            return cls()


_SUMS = TypeAdapter(dict[str, _Sums])


def _lent_gib(nodes: Iterable[Node]) -> dict[str, float]:
    """Return what each owner lends: what azu uses or could take, without what the owner uses itself."""
    lent: dict[str, float] = {}
    for node in nodes:
        total, used = node.vram_total_bytes, node.vram_used_bytes
        size = total if used is None else min(total, node.vram_free_bytes + used)
        if node.state is NodeState.ALIVE and size > 0:
            lent[node.payout_address] = lent.get(node.payout_address, 0.0) + size / GIB
    return lent
