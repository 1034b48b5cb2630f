"""Every measurement on a model so small that only the way is measured, not the speed."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from azu.bench.model import ModelShape
from azu.bench.report import Measurement, call_apart
from azu.bench.suite import MEASUREMENTS, run_bench
from azu.errors import InvalidRequest

TINY = ModelShape(4, 64, 4, 2, 96, 97, 2048)
TIMEOUT_S = 900


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def figures(name: str) -> tuple[Measurement, ...]:
    (measured,) = run_bench((name,), TINY).measured
    assert measured.measurement == name
    return measured.figures


def test_a_name_that_is_no_measurement_is_refused_with_those_that_are() -> None:
    with pytest.raises(InvalidRequest, match=r"no measurement 'spede'.*settling"):
        run_bench(("spede",), TINY)


@pytest.mark.prove
@pytest.mark.parametrize("name", ["settling", "sharding"])
def test_measures_without_stages(name: str) -> None:
    (figure,) = figures(name)

    assert math.isfinite(figure.ratio)
    assert figure.value > 0


@pytest.mark.prove
@pytest.mark.parametrize("name", sorted(set(MEASUREMENTS) - {"settling", "sharding"}))
def test_measures_over_real_actors(name: str) -> None:
    # In a process of its own: Ray keeps the token of the first cluster that a process speaks to.
    found = call_apart(TIMEOUT_S, figures, name)

    assert all(figure.value > 0 and math.isfinite(figure.ratio) for figure in found)
    if name == "many_streams":
        assert found[0].notes["equal streams"] == 16


def test_ray_is_not_imported_before_its_environment_is_set() -> None:
    program = "import sys, azu.cli.bench, azu.bench.suite; print('ray' in sys.modules)"

    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"
