"""What a device has now: a budget of main memory, and what a GPU's driver says of its processes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from pydantic import TypeAdapter

from azu.engine.device import CpuMeter, DeviceSpeed, device_speed, open_meter, own_bytes
from azu.errors import InternalError
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


SPEED = TypeAdapter(DeviceSpeed)


def test_a_cpu_is_measured_in_a_believable_range(tmp_path: Path) -> None:
    speed = device_speed("cpu", tmp_path)

    assert 1e8 < speed.memory_bytes_per_s < 1e13
    assert 1e8 < speed.flops_per_s < 1e15
    assert speed.gpu_uuid is None


def test_the_best_measurement_stays_when_the_machine_is_busy_later(tmp_path: Path) -> None:
    measured = device_speed("cpu", tmp_path)
    (path,) = tmp_path.iterdir()
    quick = replace(measured, memory_bytes_per_s=measured.memory_bytes_per_s * 1000)
    path.write_bytes(SPEED.dump_json(quick))

    again = device_speed("cpu", tmp_path)

    assert again.memory_bytes_per_s == quick.memory_bytes_per_s
    assert again.flops_per_s >= quick.flops_per_s
    assert SPEED.validate_json(path.read_bytes()) == again


def test_what_was_measured_on_other_hardware_does_not_count(tmp_path: Path) -> None:
    measured = device_speed("cpu", tmp_path)
    (path,) = tmp_path.iterdir()
    other = replace(measured, hardware="another box", memory_bytes_per_s=1e30)
    path.write_bytes(SPEED.dump_json(other))

    assert device_speed("cpu", tmp_path).memory_bytes_per_s < 1e15


@pytest.mark.parametrize("content", [b"", b"{", b'{"hardware": 1}'])
def test_a_broken_file_is_measured_again(tmp_path: Path, content: bytes) -> None:
    device_speed("cpu", tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)

    assert SPEED.validate_json(path.read_bytes() if device_speed("cpu", tmp_path) else b"")


@pytest.mark.prove
def test_a_gpu_that_is_not_there_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="cuda:77 cannot be measured"):
        device_speed("cuda:77", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no NVIDIA card here")
def test_a_card_is_measured_and_its_memory_is_told(tmp_path: Path) -> None:
    speed = device_speed("cuda:0", tmp_path)
    assert speed.memory_bytes_per_s > 1e10
    assert speed.flops_per_s > 1e12

    meter = open_meter(speed)
    memory = meter.memory(2**60, [])
    assert memory.free_bytes > 0
    assert memory.used_bytes == 0
    assert memory.other_bytes >= 0
    assert meter.memory(100 * MIB, []).free_bytes <= 100 * MIB
    assert 0 <= meter.load() <= 1
