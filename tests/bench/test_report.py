import pytest

from azu.bench.report import BenchReport, Measured, Measurement


def figure(value: float, **target: float) -> Measurement:
    return Measurement("hop", "ms", value, 2.0, "the limit", **target)


@pytest.mark.parametrize(
    ("found", "passed"),
    [
        (figure(2.0, at_least=1.0), True),
        (figure(1.9, at_least=1.0), False),
        (figure(2.0, at_most=1.0), True),
        (figure(2.1, at_most=1.0), False),
        (figure(9.0), None),
    ],
)
def test_a_figure_passes_by_its_ratio_to_the_reference(found: Measurement, passed: bool | None) -> None:
    assert found.passed is passed


def test_a_report_fails_with_one_missed_target_and_not_for_want_of_one() -> None:
    good = Measured("a", (figure(2.0, at_least=1.0), figure(0.1)), load=0.0, seconds=1.0)
    bad = Measured("b", (figure(1.0, at_least=1.0),), load=0.0, seconds=1.0)

    assert BenchReport(2, (good,)).passed
    assert not BenchReport(2, (good, bad)).passed


def test_programs_read_ratios_and_verdicts() -> None:
    report = BenchReport(2, (Measured("a", (figure(1.0, at_least=1.0),), load=0.5, seconds=1.0),))

    (measured,) = report.facts()["measurements"]

    assert measured["figures"][0]["ratio"] == 0.5
    assert measured["figures"][0]["passed"] is False
