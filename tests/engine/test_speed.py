"""A device's speed is measured once more at each start, and the best is remembered."""

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from azu.engine.device import open_meter
from azu.engine.speed import DeviceSpeed, device_speed
from azu.errors import InternalError
from azu.units import MIB

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
