"""A device's memory: a budget of main memory, or a GPU's memory as its driver reports it; and its speed."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from pydantic import TypeAdapter

from azu.engine.device import (
    CpuMeter,
    DeviceSpeed,
    device_bytes,
    device_speed,
    open_meter,
    others_part,
    own_bytes,
)
from azu.errors import InternalError
from azu.units import MIB

HOLD = "held = bytearray(64 * 2**20); print('held', flush=True); input()"


def test_a_cpu_has_its_budget_free_but_never_more_than_the_machine_has() -> None:
    meter = CpuMeter()

    assert meter.memory(8 * MIB, []).free_bytes == 8 * MIB
    assert meter.memory(2**60, []).free_bytes <= psutil.virtual_memory().total


def test_the_memory_of_processes_is_measured_and_an_ended_process_has_none() -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    used = CpuMeter().memory(0, [child.pid]).used_bytes
    assert used is not None
    assert 64 * MIB <= used <= 128 * MIB

    child.communicate(b"\n", timeout=120)
    assert CpuMeter().memory(0, [child.pid]).used_bytes == 0


def test_load_is_between_zero_and_one() -> None:
    assert 0 <= CpuMeter().load() <= 1


@pytest.mark.parametrize(
    ("listed", "own", "expected"),
    [
        ({7: 10, 8: 20, 9: 40}, [7, 8], 30),
        ({9: 40}, [], 0),  # no pieces yet, only another program
        ({}, [7], 0),  # a piece that is not on the card yet
        ({7: 10}, [7, 8], 10),  # the second is not on the card yet
        ({900: 10}, [7], None),  # the host's process ids, unknown in this container
        ({7: None}, [7], None),  # a driver without sizes
    ],
)
def test_used_bytes_of_a_card_are_those_that_the_driver_lists_for_azus_processes(
    listed: dict[int, int | None], own: list[int], expected: int | None
) -> None:
    assert own_bytes(listed, own) == expected


def test_a_device_without_a_gpu_has_a_cpu_meter() -> None:
    assert isinstance(open_meter(DeviceSpeed("box", 1e10, 1e11)), CpuMeter)


BURN = "print('burns', flush=True)\nwhile True: pass"


def test_the_load_of_others_is_what_azus_own_processes_do_not_use() -> None:
    with subprocess.Popen([sys.executable, "-c", BURN], stdout=subprocess.PIPE) as burning:
        try:
            assert burning.stdout is not None
            burning.stdout.readline()
            others, own = CpuMeter(), CpuMeter()
            assert (others.others_load([]), own.others_load([burning.pid])) == (0.0, 0.0)
            used = psutil.Process(burning.pid)
            began_s, deadline_s = used.cpu_times().user, time.monotonic() + 60
            while used.cpu_times().user < began_s + 0.3:
                assert time.monotonic() < deadline_s
                time.sleep(0.02)
            of_others, less_its_own = others.others_load([]), own.others_load([burning.pid])
        finally:
            burning.kill()
    assert of_others is not None
    assert less_its_own is not None
    assert 0 <= less_its_own < of_others <= 1


@pytest.mark.parametrize(
    ("percents", "own", "running", "expected"),
    [
        ({7: [40, 60], 8: [20]}, [7], [7, 8], 0.2),
        ({8: [60], 9: [80]}, [], [8, 9], 1.0),  # no pieces yet, only others
        ({7: [50]}, [7], [7], 0.0),
        ({}, [7], [7], 0.0),
        ({900: [50]}, [7], [900], None),  # the host's process ids, unknown in this container
    ],
)
def test_the_part_of_a_card_that_others_use_is_theirs_in_the_drivers_samples(
    percents: dict[int, list[int]], own: list[int], running: list[int], expected: float | None
) -> None:
    assert others_part(percents, own, running) == expected


SPEED = TypeAdapter(DeviceSpeed)


class Clock:
    """A clock that advances by `step_s` at each reading, so that each measured operation takes so long."""

    def __init__(self) -> None:
        self.step_s = 0.5
        self._now_s = 0.0

    def perf_counter(self) -> float:
        self._now_s += self.step_s
        return self._now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("azu.engine.device.time", clock)
    return clock


def test_a_cpus_speed_is_its_bytes_and_operations_by_time(clock: Clock, tmp_path: Path) -> None:
    speed = device_speed("cpu", tmp_path)

    # A copy of 64 MiB reads and writes every byte; a product of 512 x 512 matrices is 512^3 multiply-adds.
    assert speed.memory_bytes_per_s == 2 * 64 * MIB / 0.5
    assert speed.flops_per_s == 2 * 512**3 / 0.5
    # Two operations for a token and a parameter of four bytes.
    assert speed.work_bytes_per_s == 2 * speed.flops_per_s
    assert speed.gpu_uuid is None


def test_the_best_measurement_stays_when_the_machine_is_busy_later(clock: Clock, tmp_path: Path) -> None:
    quick = device_speed("cpu", tmp_path)
    clock.step_s = 5.0

    again = device_speed("cpu", tmp_path)

    (path,) = tmp_path.iterdir()
    assert again == quick == SPEED.validate_json(path.read_bytes())


def test_a_better_measurement_replaces_the_stored_one(clock: Clock, tmp_path: Path) -> None:
    slow = device_speed("cpu", tmp_path)
    clock.step_s = 0.05

    again = device_speed("cpu", tmp_path)

    (path,) = tmp_path.iterdir()
    assert again.flops_per_s == pytest.approx(10 * slow.flops_per_s)
    assert SPEED.validate_json(path.read_bytes()) == again


def test_a_measurement_of_other_hardware_does_not_count(clock: Clock, tmp_path: Path) -> None:
    measured = device_speed("cpu", tmp_path)
    (path,) = tmp_path.iterdir()
    other = replace(measured, hardware="another box", memory_bytes_per_s=1e30)
    path.write_bytes(SPEED.dump_json(other))

    assert device_speed("cpu", tmp_path) == measured


@pytest.mark.parametrize("content", [b"", b"{", b'{"hardware": 1}'])
def test_the_device_is_measured_again_when_its_file_is_broken(tmp_path: Path, content: bytes) -> None:
    device_speed("cpu", tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)

    assert SPEED.validate_json(path.read_bytes() if device_speed("cpu", tmp_path) else b"")


@pytest.mark.prove
def test_a_missing_gpu_raises_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="cuda:77 cannot be measured"):
        device_speed("cuda:77", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="there is no NVIDIA card")
def test_a_gpu_has_a_speed_a_name_and_a_memory(tmp_path: Path) -> None:
    speed = device_speed("cuda:0", tmp_path)
    assert speed.memory_bytes_per_s > 0
    assert speed.flops_per_s > 0
    assert speed.gpu_uuid is not None

    meter = open_meter(speed)
    memory = meter.memory(2**60, [])
    assert memory.free_bytes > 0
    assert memory.used_bytes == 0
    assert memory.other_bytes >= 0
    assert meter.memory(100 * MIB, []).free_bytes <= 100 * MIB
    assert 0 <= meter.load() <= 1
    others, celsius, card = meter.others_load([]), meter.celsius(), device_bytes("0")
    assert others is None or 0 <= others <= 1
    assert celsius is None or 0 < celsius < 120
    assert card is not None
    assert card >= memory.free_bytes
