"""How fast a device is, by a short measurement that is remembered. torch is loaded for a GPU only.

`python -m azu.engine.speed cuda:0` measures one and prints it: a GPU is measured in a process of its own,
for the memory that CUDA itself takes on the card would else be gone for as long as the measurer lives.
"""

import hashlib
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from azu.errors import DeadlineExceeded, InternalError
from azu.sharding.durable import replacing, write_all
from azu.units import MIB

log = logging.getLogger(__name__)

# Copies have to exceed the device's caches, products have to fill its units.
_CPU_COPY_BYTES, _CPU_MATRIX = 64 * MIB, 512
_GPU_COPY_BYTES, _GPU_MATRIX = 512 * MIB, 4096
_ROUNDS = 5
_MEASURE_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """How fast weights are read and matrices are multiplied: float32 on a CPU, bfloat16 on a GPU.

    `hardware` names the device and, for a GPU, its `gpu_uuid` as NVML knows it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    hardware: str
    memory_bytes_per_s: float
    flops_per_s: float
    gpu_uuid: str | None = None


_SPEED = TypeAdapter(DeviceSpeed)


def device_speed(device: str, folder: Path) -> DeviceSpeed:
    """Return the best that was ever measured of "cpu" or "cuda:0"; `folder` remembers it.

    A busy machine measures too little, never too much, so that the best is the steadiest. Raises
    DeadlineExceeded or InternalError when a GPU cannot be measured.
    """
    now = _cpu_speed() if device == "cpu" else _measured_apart(device)
    path = folder / f"{hashlib.sha256(now.hardware.encode()).hexdigest()[:16]}.json"
    before = _remembered(path)
    if before is not None and before.hardware == now.hardware:
        now = replace(
            now,
            memory_bytes_per_s=max(now.memory_bytes_per_s, before.memory_bytes_per_s),
            flops_per_s=max(now.flops_per_s, before.flops_per_s),
        )
    if now != before:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, part=path.with_name(f".{path.name}.{os.getpid()}.part")) as file:
            write_all(file, _SPEED.dump_json(now))
    return now


def _remembered(path: Path) -> DeviceSpeed | None:
    try:
        return _SPEED.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        log.warning("%s is not a speed; it is measured again", path)
        return None


def _measured_apart(device: str) -> DeviceSpeed:
    command = [sys.executable, "-m", "azu.engine.speed", device]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=_MEASURE_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"{device} was not measured in {_MEASURE_TIMEOUT_S:.0f} s") from error
    except subprocess.CalledProcessError as error:
        raise InternalError(f"{device} cannot be measured: {error.stderr.decode()[-500:]}") from error
    return _SPEED.validate_json(done.stdout)


def _cpu_speed() -> DeviceSpeed:
    source = np.zeros(_CPU_COPY_BYTES, dtype=np.uint8)
    target = np.empty_like(source)
    matrix = np.ones((_CPU_MATRIX, _CPU_MATRIX), dtype=np.float32)
    return DeviceSpeed(
        f"{platform.node()} {platform.machine()} {os.cpu_count()} cores",
        # A copy reads and writes every byte.
        2 * _CPU_COPY_BYTES / _best_s(lambda: np.copyto(target, source)),
        2 * _CPU_MATRIX**3 / _best_s(lambda: matrix @ matrix),
    )


def _gpu_speed(device: str) -> DeviceSpeed:
    import torch  # noqa: PLC0415

    found = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    size = min(_GPU_COPY_BYTES, free // 4)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.ones(_GPU_MATRIX, _GPU_MATRIX, device=device, dtype=torch.bfloat16)

    def finished(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            torch.cuda.synchronize(device)

        return run

    return DeviceSpeed(
        f"{found.name} {found.uuid}",
        2 * size / _best_s(finished(lambda: target.copy_(source))),
        2 * _GPU_MATRIX**3 / _best_s(finished(lambda: matrix @ matrix)),
        f"GPU-{found.uuid}",
    )


def _best_s(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    sys.stdout.buffer.write(_SPEED.dump_json(_gpu_speed(sys.argv[1])))
