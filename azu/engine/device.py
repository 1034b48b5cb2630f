"""What a node's device has now: live free memory, who holds the rest, and how busy it is."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

import psutil

from azu.engine.speed import DeviceSpeed


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes at one moment.

    `free_bytes` is what azu may still take; `used_bytes` what its own processes hold, None where they cannot
    be told from others; `other_bytes` what other programs hold on the card.
    """

    free_bytes: int
    used_bytes: int | None
    other_bytes: int


class DeviceMeter(Protocol):
    """Reads one device."""

    def memory(self, lent_bytes: int, own_pids: Collection[int]) -> DeviceMemory:
        """Return what a device has, of which its owner lends `lent_bytes`, beside azu's processes there."""

    def load(self) -> float:
        """Return the part of the time since the last call that the device was busy, 0 to 1."""


def open_meter(speed: DeviceSpeed) -> DeviceMeter:
    """Return the meter of a device that was measured; a GPU's needs NVIDIA's driver."""
    if speed.gpu_uuid is None:
        return CpuMeter()
    from azu.engine.nvidia import NvidiaMeter  # noqa: PLC0415 - its driver is on machines with a GPU only

    return NvidiaMeter(speed.gpu_uuid)


class CpuMeter:
    """A budget of main memory.

    What the processes really hold is told beside it: a good part of it is their code, which no plan counts.
    """

    def memory(self, lent_bytes: int, own_pids: Collection[int]) -> DeviceMemory:
        """Return the budget, or less where the machine itself has less to give."""
        available = int(psutil.virtual_memory().available)
        return DeviceMemory(min(lent_bytes, available), _resident_bytes(own_pids), other_bytes=0)

    def load(self) -> float:
        """Return the busy part of all cores."""
        return psutil.cpu_percent() / 100


def _resident_bytes(pids: Iterable[int]) -> int:
    total = 0
    for pid in pids:
        try:
            total += int(psutil.Process(pid).memory_info().rss)
        except psutil.NoSuchProcess:
            continue  # it ended between two looks
    return total
