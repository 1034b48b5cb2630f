"""What `azu bench` found: figures beside the reference of the same run."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of azu and what it is held against.

    `ratio` is what counts: it has to be `at_least` or `at_most` the target, where there is one. `notes` holds
    whatever else the run showed, by name and unit.
    """

    name: str
    unit: str
    value: float
    reference: float
    reference_name: str
    at_least: float | None = None
    at_most: float | None = None
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """The figure over its reference."""
        return self.value / self.reference

    @property
    def passed(self) -> bool | None:
        """Whether the target was met; None where there is none."""
        if self.at_least is not None:
            return self.ratio >= self.at_least
        return self.ratio <= self.at_most if self.at_most is not None else None


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement's figures. `load` is the machine's load when it began: what else it was computing."""

    measurement: str
    figures: tuple[Figure, ...]
    load: float
    seconds: float


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All that was measured in one run, on `cpus` cores."""

    cpus: int
    measured: tuple[Measured, ...]

    @property
    def passed(self) -> bool:
        """Whether no target was missed."""
        return all(figure.passed is not False for one in self.measured for figure in one.figures)

    def facts(self) -> dict[str, object]:
        """Return the report for programs, ratios and verdicts included."""
        return {
            "cpus": self.cpus,
            "passed": self.passed,
            "measurements": [
                {
                    "measurement": one.measurement,
                    "load": one.load,
                    "seconds": one.seconds,
                    "figures": [_facts(figure) for figure in one.figures],
                }
                for one in self.measured
            ],
        }


def _facts(figure: Figure) -> dict[str, object]:
    return {
        "name": figure.name,
        "unit": figure.unit,
        "value": figure.value,
        "reference": figure.reference,
        "reference_name": figure.reference_name,
        "ratio": figure.ratio,
        "at_least": figure.at_least,
        "at_most": figure.at_most,
        "passed": figure.passed,
        "notes": dict(figure.notes),
    }
