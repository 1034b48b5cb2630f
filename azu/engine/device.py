"""What a node's device has: live free memory and measured speed. torch is loaded for a GPU only."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_COPY_BYTES = 32 * 1024 * 1024
_MATRIX = 512
_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """Measured on the device: how fast weights are read, how fast float32 matrices are multiplied."""

    memory_bytes_per_s: float
    flops_per_s: float


class DeviceMeter:
    """Measures one device, "cpu" or "cuda:0". `lent_bytes` is what its owner lends."""

    def __init__(self, device: str, lent_bytes: int) -> None:
        self._device = device
        self._lent_bytes = lent_bytes
        self.speed = _cpu_speed() if device == "cpu" else _gpu_speed(device)

    def free_bytes(self) -> int:
        """Return what could be loaded now: on a GPU never more than the card has free, whoever uses it."""
        if self._device == "cpu":
            return self._lent_bytes
        import torch  # noqa: PLC0415

        free, _ = torch.cuda.mem_get_info(self._device)
        return min(self._lent_bytes, free)


def _cpu_speed() -> DeviceSpeed:
    source = np.zeros(_COPY_BYTES, dtype=np.uint8)
    target = np.empty_like(source)
    matrix = np.ones((_MATRIX, _MATRIX), dtype=np.float32)
    return _speed(lambda: np.copyto(target, source), lambda: matrix @ matrix)


def _gpu_speed(device: str) -> DeviceSpeed:
    import torch  # noqa: PLC0415

    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.ones(_MATRIX, _MATRIX, device=device)

    def finished(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            torch.cuda.synchronize(device)

        return run

    return _speed(finished(lambda: target.copy_(source)), finished(lambda: matrix @ matrix))


def _speed(copy: Callable[[], object], product: Callable[[], object]) -> DeviceSpeed:
    # A copy reads and writes every byte.
    return DeviceSpeed(2 * _COPY_BYTES / _best_s(copy), 2 * _MATRIX**3 / _best_s(product))


def _best_s(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best
