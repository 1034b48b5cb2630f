"""Cutting the model into shards, beside `cp` of the same bytes."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from azu.architecture import describe
from azu.cli.bench.model import bench_model
from azu.cli.bench.results import Figure
from azu.engine.reference import ModelShape
from azu.sharding.cut import cut

_TIMEOUT_S = 300.0
_MIB = 1024 * 1024


def measure(shape: ModelShape) -> tuple[Figure, ...]:
    """Return the speed of a cut, which checks every value, hashes and flushes what it writes."""
    model = bench_model(shape)
    weights = sorted(model.source.glob("*.safetensors"))
    num_bytes = sum(path.stat().st_size for path in weights)
    architecture = describe(model.source)
    with tempfile.TemporaryDirectory(prefix="azu-bench-") as folder:
        copied, shards = Path(folder) / "copied", Path(folder) / "shards"
        copied.mkdir()
        # What the disk still has to write of earlier runs is nobody's work here, and all is read from memory.
        os.sync()
        _read(weights)
        copy_s = _seconds(lambda: _cp(weights, copied))
        synced_s = copy_s + _seconds(os.sync)
        shutil.rmtree(copied)
        cut_s = _seconds(
            lambda: cut(
                model.source, shards, model_id="azu/bench", revision="bench", architecture=architecture
            )
        )
    return (
        Figure(
            name="sharding",
            unit="MiB/s",
            value=num_bytes / cut_s / _MIB,
            reference=num_bytes / copy_s / _MIB,
            reference_name="cp",
            at_least=0.4,
            notes={"MiB": num_bytes / _MIB, "s": cut_s, "cp s": copy_s, "cp and sync s": synced_s},
        ),
    )


def _read(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            while file.read(16 * _MIB):
                pass


def _cp(files: list[Path], folder: Path) -> None:
    subprocess.run(["cp", *map(str, files), str(folder)], check=True, timeout=_TIMEOUT_S)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
