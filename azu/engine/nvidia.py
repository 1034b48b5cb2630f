"""A card's memory and load as NVIDIA's driver tells them: of every program, without a context of ours."""

from collections.abc import Collection, Mapping

import pynvml

from azu.engine.device import DeviceMemory


class NvidiaMeter:
    """Reads one GPU through NVML."""

    def __init__(self, gpu_uuid: str) -> None:
        """Raises pynvml.NVMLError when the driver does not know the card."""
        pynvml.nvmlInit()
        self._card = pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid)

    def memory(self, lent_bytes: int, own_pids: Collection[int]) -> DeviceMemory:
        """Return what the card has free, within what its owner lends."""
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


def own_bytes(bytes_by_pid: Mapping[int, int | None], own_pids: Collection[int]) -> int | None:
    """Return what our processes hold, or None when the driver cannot say.

    In a container it names processes by ids that mean nothing inside, and under Windows it knows no sizes.
    """
    listed = [bytes_by_pid[pid] for pid in own_pids if pid in bytes_by_pid]
    if own_pids and bytes_by_pid and not listed:
        return None
    sizes = [size for size in listed if size is not None]
    return sum(sizes) if len(sizes) == len(listed) else None
