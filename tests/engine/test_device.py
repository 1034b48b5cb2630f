"""What a device has now: a budget of main memory, and what a GPU's driver says of its processes."""

import subprocess
import sys

import psutil
import pytest

from azu.engine.device import CpuMeter, open_meter
from azu.engine.nvidia import own_bytes
from azu.engine.speed import DeviceSpeed
from azu.units import MIB

HOLD = "held = bytearray(64 * 2**20); print('held', flush=True); input()"


def test_a_cpu_offers_its_budget_but_never_more_than_the_machine_has() -> None:
    meter = CpuMeter()

    assert meter.memory(8 * MIB, []).free_bytes == 8 * MIB
    assert meter.memory(2**60, []).free_bytes <= psutil.virtual_memory().total


def test_what_processes_hold_is_measured_and_the_dead_hold_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    used = CpuMeter().memory(0, [child.pid]).used_bytes
    assert used is not None
    assert 64 * MIB <= used <= 128 * MIB

    child.communicate(b"\n", timeout=10)
    assert CpuMeter().memory(0, [child.pid]).used_bytes == 0


def test_load_is_a_part_of_one() -> None:
    assert 0 <= CpuMeter().load() <= 1


@pytest.mark.parametrize(
    ("listed", "own", "expected"),
    [
        ({7: 10, 8: 20, 9: 40}, [7, 8], 30),
        ({9: 40}, [], 0),  # no pieces yet, another program
        ({}, [7], 0),  # a piece that is not on the card yet
        ({7: 10}, [7, 8], 10),  # the second is not on the card yet
        ({900: 10}, [7], None),  # ids of another namespace: nobody knows whose it is
        ({7: None}, [7], None),  # a driver that knows no sizes
    ],
)
def test_our_part_of_a_card_is_what_the_driver_lists_for_our_processes(
    listed: dict[int, int | None], own: list[int], expected: int | None
) -> None:
    assert own_bytes(listed, own) == expected


def test_a_device_without_a_card_is_read_as_a_cpu() -> None:
    assert isinstance(open_meter(DeviceSpeed("box", 1e10, 1e11)), CpuMeter)
