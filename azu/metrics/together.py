"""The pictures of many processes as one. What a process counted stays counted when it is gone."""

from collections.abc import Iterable

from azu.metrics.catalogue import BY_NAME, Kind
from azu.metrics.meter import Histogram, Labels, Picture, added

# Meters speak each second; what a silent one showed last says nothing about now.
SILENCE_S = 10.0
_NOTHING = Picture({}, {})


class Together:
    """Hears the meters of a network's processes, each under a name that is used once."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[float, Picture]] = {}
        self._gone: set[str] = set()
        self._past = _NOTHING

    def hear(self, source: str, picture: Picture, now_s: float) -> None:
        """Take what a process shows; it replaces what that one showed before."""
        if source not in self._gone:
            self._heard[source] = (now_s, picture)

    def picture(self, now_s: float) -> Picture:
        """Return the sum: counters of all that ever were, gauges of those that spoke lately."""
        for source, (heard_s, picture) in list(self._heard.items()):
            if now_s - heard_s > SILENCE_S:
                self._past = merged((self._past, _lasting(picture)))
                self._gone.add(source)
                del self._heard[source]
        return merged((self._past, *(picture for _, picture in self._heard.values())))


def merged(pictures: Iterable[Picture]) -> Picture:
    """Return the sum of pictures, series by series."""
    values: dict[tuple[str, Labels], float] = {}
    histograms: dict[tuple[str, Labels], Histogram] = {}
    for picture in pictures:
        for key, value in picture.values.items():
            values[key] = values.get(key, 0) + value
        for key, one in picture.histograms.items():
            before = (histograms[key],) if key in histograms else ()
            histograms[key] = added(BY_NAME[key[0]], (*before, one))
    return Picture(values, histograms)


def _lasting(picture: Picture) -> Picture:
    counters = {key: value for key, value in picture.values.items() if BY_NAME[key[0]].kind is Kind.COUNTER}
    return Picture(counters, picture.histograms)
