"""The owner's terms for a node: when it takes pieces, how warm it gets, and what disk and network it uses."""

import re
from dataclasses import dataclass
from datetime import time

from pydantic import ConfigDict, TypeAdapter

from azu.errors import InvalidRequest

# Other programs want a device of which they use so much, for so long; it lends again after the second time.
_WANTED_LOAD = 0.25
_WANTED_S, _QUIET_S = 10.0, 120.0
# A device that was too hot lends again when it is so many degrees below the limit.
_COOLER_C = 5.0
# The variable in a node's environment with its owner's terms.
TERMS = "AZU_LENDING"
_HOURS = re.compile(r"(\d{1,2})(?::([0-5]\d))?-(\d{1,2})(?::([0-5]\d))?")
_DAY_MIN = 24 * 60


@dataclass(frozen=True, slots=True)
class Hours:
    """A part of each day in the machine's own time, in minutes from midnight.

    One that ends before it begins goes over midnight.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    begin_min: int
    end_min: int

    @classmethod
    def parse(cls, text: str) -> "Hours":
        """Return the hours of a text such as "22-07" or "8:30-17"; raises InvalidRequest for any other."""
        match = _HOURS.fullmatch(text.strip())
        ends = [60 * int(match[at]) + int(match[at + 1] or 0) for at in (1, 3)] if match else [_DAY_MIN + 1]
        if max(ends) > _DAY_MIN:
            raise InvalidRequest(f"{text} is no part of a day, such as 22-07 or 8:30-17", param="hours")
        return cls(*ends)

    def contain(self, at: time) -> bool:
        """Return whether a time of the day is in them; equal ends are the whole day."""
        minute = 60 * at.hour + at.minute
        if self.begin_min < self.end_min:
            return self.begin_min <= minute < self.end_min
        return minute >= self.begin_min or minute < self.end_min


@dataclass(frozen=True, slots=True)
class LendingTerms:
    """What a node's owner allows; None is no limit.

    Outside of `hours`, from `max_celsius` on, and with `yields` while other programs use the device, the node
    is paused. Its shards take at most `disk_bytes` on disk, and are fetched at most at `fetch_bytes_per_s`.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    hours: Hours | None = None
    max_celsius: float | None = None
    yields: bool = False
    disk_bytes: int | None = None
    fetch_bytes_per_s: int | None = None

    def to_json(self) -> str:
        """Return the terms as a variable of the node's environment has them."""
        return _TERMS.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "LendingTerms":
        """Return the terms that `to_json` wrote."""
        return _TERMS.validate_json(text)


_TERMS = TypeAdapter(LendingTerms)


class Pauses:
    """Says why a node is to give its pieces away now. The clock is the caller's, in seconds."""

    def __init__(self, terms: LendingTerms) -> None:
        self._terms = terms
        self._is_hot = False
        self._is_wanted = False
        # Since when other programs have used the device, or left it alone: the opposite of what stands.
        self._other_since_s: float | None = None

    def why(self, at: time, now_s: float, celsius: float | None, others_load: float | None) -> str:
        """Return why the node is paused, "" while it lends.

        `at` is the time of the day, `others_load` the part of the device that other programs use, 0 to 1;
        None where it cannot be measured.
        """
        terms = self._terms
        if terms.yields and others_load is not None:
            self._judge_load(others_load >= _WANTED_LOAD, now_s)
        if terms.hours is not None and not terms.hours.contain(at):
            return "outside of its hours"
        if terms.max_celsius is not None and celsius is not None:
            self._is_hot = celsius >= terms.max_celsius - (_COOLER_C if self._is_hot else 0.0)
            if self._is_hot:
                return f"its device has {celsius:.0f} degrees"
        return "another program uses its device" if self._is_wanted else ""

    def _judge_load(self, is_used: bool, now_s: float) -> None:
        if is_used == self._is_wanted:
            self._other_since_s = None
            return
        self._other_since_s = now_s if self._other_since_s is None else self._other_since_s
        if now_s - self._other_since_s >= (_QUIET_S if self._is_wanted else _WANTED_S):
            self._is_wanted, self._other_since_s = is_used, None


class Pace:
    """Spreads what is fetched so that it is no more than `bytes_per_s`; the clock is in seconds."""

    def __init__(self, bytes_per_s: int | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = float("-inf")

    def wait_s(self, num_bytes: int, now_s: float) -> float:
        """Return how long to wait before so many bytes are fetched; they count as fetched."""
        if self._bytes_per_s is None:
            return 0.0
        begin_s = max(now_s, self._free_s)
        self._free_s = begin_s + num_bytes / self._bytes_per_s
        return begin_s - now_s
