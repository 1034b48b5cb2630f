"""What a node's device has: live free memory and measured speed."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_COPY_BYTES = 32 * 1024 * 1024
_MATRIX = 512


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """Measured on the device: how fast weights are read, how fast matrices are multiplied."""

    memory_bytes_per_s: float
    flops_per_s: float


class DeviceMeter:
    """Measures one device, "cpu" or "cuda:0". `lent_bytes` is what its owner lends."""

    def __init__(self, device: str, lent_bytes: int) -> None:
        self._device = torch.device(device)
        self._lent_bytes = lent_bytes
        self.speed = measure_speed(self._device)

    def free_bytes(self) -> int:
        """Return what could be loaded now: on a GPU never more than the card has free, whoever uses it."""
        if self._device.type != "cuda":
            return self._lent_bytes
        free, _ = torch.cuda.mem_get_info(self._device)
        return min(self._lent_bytes, free)


def measure_speed(device: torch.device) -> DeviceSpeed:
    """Measure memory bandwidth by a copy and compute by a product of float32 matrices."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _best_s(lambda: target.copy_(source), device)
    left = torch.ones(_MATRIX, _MATRIX, device=device)
    product_s = _best_s(lambda: torch.mm(left, left), device)
    return DeviceSpeed(2 * _COPY_BYTES / copy_s, 2 * _MATRIX**3 / product_s)


def _best_s(work: Callable[[], object], device: torch.device, rounds: int = 4) -> float:
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
