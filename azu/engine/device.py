"""A node's device: its memory and load now, and its speed, which is measured.

Run as a program with a GPU's name, this file measures that GPU and prints the speed as JSON: so the process
that asks needs no torch and holds no memory of the card.
"""

import hashlib
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
import pynvml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from azu.errors import DeadlineExceeded, InternalError
from azu.files import replacing, write_all
from azu.units import MIB

log = logging.getLogger(__name__)
# Sizes of what is measured: copies exceed the device's caches, products fill its units.
_CPU_COPY_BYTES, _CPU_MATRIX = 64 * MIB, 512
_GPU_COPY_BYTES, _GPU_MATRIX = 512 * MIB, 4096
_ROUNDS = 5
_MEASURE_TIMEOUT_S = 120.0
# The limit of a container, where this process runs in one.
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device's memory at one moment.

    azu may still take `free_bytes`. Its own processes hold `used_bytes`: None when the driver does not say
    so. Other programs hold `other_bytes` on the card.
    """

    free_bytes: int
    used_bytes: int | None
    other_bytes: int


class DeviceMeter(Protocol):
    """Reads the memory and load of one device."""

    def memory(self, lent_bytes: int, own_pids: Collection[int]) -> DeviceMemory:
        """Return the memory of a device whose owner lends `lent_bytes` and where azu runs as `own_pids`."""

    def load(self) -> float:
        """Return the part of the time since the last call in which the device was busy, 0 to 1."""

    def others_load(self, own_pids: Collection[int]) -> float | None:
        """Return the part of the device that other programs used since the last call, 0 to 1.

        `own_pids` are azu's processes, of a GPU those that use it. None where the driver does not know them.
        """

    def celsius(self) -> float | None:
        """Return how warm the device is; None without a sensor."""


class CpuMeter:
    """A budget of main memory.

    `used_bytes` is the resident memory of azu's processes. Much of it is code, which no plan counts.
    """

    def __init__(self) -> None:
        self._busy_s: tuple[float, float, dict[int, float]] | None = None

    def memory(self, lent_bytes: int, own_pids: Collection[int]) -> DeviceMemory:
        """Return the budget, or less when the machine itself has less memory available."""
        available = int(psutil.virtual_memory().available)
        return DeviceMemory(min(lent_bytes, available), _resident_bytes(own_pids), other_bytes=0)

    def load(self) -> float:
        """Return the busy part of all cores."""
        return psutil.cpu_percent() / 100

    def others_load(self, own_pids: Collection[int]) -> float | None:
        """Return the part of all cores that other programs used; 0 at the first call."""
        times = psutil.cpu_times()
        now = sum(times), sum(times) - times.idle - getattr(times, "iowait", 0.0), _cpu_s(own_pids)
        before, self._busy_s = self._busy_s, now
        if before is None or now[0] <= before[0]:
            return 0.0
        own_s = sum(spent - before[2][pid] for pid, spent in now[2].items() if pid in before[2])
        return min(1.0, max(0.0, now[1] - before[1] - own_s) / (now[0] - before[0]))

    def celsius(self) -> float | None:
        """Return what the warmest sensor of the machine says."""
        found = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
        return max((one.current for sensors in found.values() for one in sensors), default=None)


def _cpu_s(pids: Iterable[int]) -> dict[int, float]:
    """Return the seconds of a core that processes have used, by id."""
    spent = {}
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            spent[pid] = times.user + times.system
    return spent


def _resident_bytes(pids: Iterable[int]) -> int:
    total = 0
    for pid in pids:
        try:
            total += int(psutil.Process(pid).memory_info().rss)
        except psutil.NoSuchProcess:
            continue  # it has ended
    return total


class NvidiaMeter:
    """Reads one GPU through NVML."""

    def __init__(self, gpu_uuid: str) -> None:
        """Raises pynvml.NVMLError when the driver does not know the card."""
        pynvml.nvmlInit()
        self._card = pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid)
        self._sampled_us = 0

    def memory(self, lent_bytes: int, own_pids: Collection[int]) -> DeviceMemory:
        """Return the card's memory; what is free is within what its owner lends."""
        card = pynvml.nvmlDeviceGetMemoryInfo(self._card)
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(self._card)
        used = own_bytes({process.pid: process.usedGpuMemory for process in running}, own_pids)
        left = lent_bytes if used is None else lent_bytes - used
        return DeviceMemory(
            free_bytes=max(0, min(int(card.free), left)),
            used_bytes=used,
            other_bytes=int(card.used) - (used or 0),
        )

    def load(self) -> float:
        """Return the busy part of the driver's last sample."""
        return int(pynvml.nvmlDeviceGetUtilizationRates(self._card).gpu) / 100

    def others_load(self, own_pids: Collection[int]) -> float | None:
        """Return what the driver's samples say of other processes."""
        try:
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(self._card)
            samples = pynvml.nvmlDeviceGetProcessUtilization(self._card, self._sampled_us)
        except pynvml.NVMLError_NotFound:
            return 0.0  # no process used it since
        except pynvml.NVMLError:
            return None
        self._sampled_us = max((one.timeStamp for one in samples), default=self._sampled_us)
        by_pid: dict[int, list[int]] = {}
        for one in samples:
            by_pid.setdefault(int(one.pid), []).append(int(one.smUtil))
        return others_part(by_pid, own_pids, [int(one.pid) for one in running])

    def celsius(self) -> float | None:
        """Return what the card's sensor says."""
        try:
            return float(pynvml.nvmlDeviceGetTemperature(self._card, pynvml.NVML_TEMPERATURE_GPU))
        except pynvml.NVMLError:
            return None


def others_part(
    percents_by_pid: Mapping[int, Sequence[int]], own_pids: Collection[int], running: Collection[int]
) -> float | None:
    """Return the part of a card that others use, 0 to 1, of the samples of each process.

    None where the driver lists `running` processes and none of azu's, as in a container: these would count
    as another program.
    """
    if own_pids and running and not set(running) & set(own_pids):
        return None
    others = (samples for pid, samples in percents_by_pid.items() if pid not in own_pids)
    return min(1.0, sum(sum(samples) / len(samples) for samples in others) / 100)


def device_bytes(gpu: str | None) -> int | None:
    """Return all the memory of a GPU, named as in CUDA_VISIBLE_DEVICES, or for None that of this machine.

    None where the driver does not know the card.
    """
    if gpu is None:
        limit = _MEMORY_LIMIT.read_text().strip() if _MEMORY_LIMIT.exists() else "max"
        total = int(psutil.virtual_memory().total)
        return min(total, int(limit)) if limit.isdigit() else total
    try:
        pynvml.nvmlInit()
        by_number = gpu.isdigit()
        card = (
            pynvml.nvmlDeviceGetHandleByIndex(int(gpu))
            if by_number
            else pynvml.nvmlDeviceGetHandleByUUID(gpu)
        )
        return int(pynvml.nvmlDeviceGetMemoryInfo(card).total)
    except pynvml.NVMLError:
        return None


def own_bytes(bytes_by_pid: Mapping[int, int | None], own_pids: Collection[int]) -> int | None:
    """Return what azu's processes hold, or None when the driver does not say so.

    In a container the driver lists process ids of the host, and under Windows it lists no sizes.
    """
    listed = [bytes_by_pid[pid] for pid in own_pids if pid in bytes_by_pid]
    if own_pids and bytes_by_pid and not listed:
        return None
    sizes = [size for size in listed if size is not None]
    return sum(sizes) if len(sizes) == len(listed) else None


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """The speed of reading memory and of multiplying matrices: float32 on a CPU, bfloat16 on a GPU.

    `hardware` names the device; `gpu_uuid` is NVML's name of a GPU.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    hardware: str
    memory_bytes_per_s: float
    flops_per_s: float
    gpu_uuid: str | None = None

    @property
    def work_bytes_per_s(self) -> int:
        """The most bytes of parameters, times tokens, that the device can multiply in a second.

        Of a batch the memory is read once, so that the operations are the bound: two for a token and a
        parameter, which has at most four bytes.
        """
        return round(2 * self.flops_per_s)


_SPEED = TypeAdapter(DeviceSpeed)


def open_meter(speed: DeviceSpeed) -> DeviceMeter:
    """Return the meter of a measured device; a GPU's meter needs NVIDIA's driver."""
    if speed.gpu_uuid is None:
        return CpuMeter()
    return NvidiaMeter(speed.gpu_uuid)


def device_speed(device: str, folder: Path) -> DeviceSpeed:
    """Measure "cpu" or a GPU such as "cuda:0" and return the best of this and earlier results in `folder`.

    A busy machine measures too little, never too much: the best result is the most stable one. Raises
    DeadlineExceeded or InternalError when a GPU cannot be measured.
    """
    now = _cpu_speed() if device == "cpu" else _measured_in_own_process(device)
    path = folder / f"{hashlib.sha256(now.hardware.encode()).hexdigest()[:16]}.json"
    before = _stored(path)
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


def _stored(path: Path) -> DeviceSpeed | None:
    try:
        return _SPEED.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        log.warning("%s does not hold a device's speed; it is measured again", path)
        return None


def _measured_in_own_process(device: str) -> DeviceSpeed:
    command = [sys.executable, "-m", "azu.engine.device", device]
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
