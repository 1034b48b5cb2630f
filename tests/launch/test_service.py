"""The unit of `azu join --service` runs the same command at each start of the machine."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from azu.launch.service import unit_path, unit_text


def test_the_unit_runs_the_command_with_its_words_as_they_are() -> None:
    command = (sys.executable, "join", "--name", 'a "quoted" name', "--payout", "50%", "$HOME")
    of_root, of_user = (unit_text(command, Path("/srv/azu"), of_root=is_root) for is_root in (True, False))

    started = f'ExecStart="{sys.executable}" "join" "--name" "a \\"quoted\\" name" "--payout" "50%%" "$$HOME"'
    assert started in of_root.splitlines()
    assert 'Environment="AZU_HOME=/srv/azu"' in of_root.splitlines()
    assert of_root.count("ExecStart") == 1
    assert "Restart=always" in of_root
    assert "WantedBy=multi-user.target" in of_root
    assert of_user == of_root.replace("multi-user.target", "default.target")


def test_the_service_has_the_gpus_that_were_chosen_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    monkeypatch.setenv("AZU_TICKET", "a secret")
    monkeypatch.setenv("AZU_API_KEY", "a secret")
    unit = unit_text((sys.executable, "join"), Path("/srv/azu"), of_root=True)

    assert 'Environment="CUDA_VISIBLE_DEVICES=0,2"' in unit.splitlines()
    assert "a secret" not in unit


def test_a_named_node_has_a_unit_of_its_own() -> None:
    path, commands = unit_path("two cards/1")
    assert path.name == "azu-join-two-cards-1.service"
    assert commands[1].endswith("--now azu-join-two-cards-1")


def test_the_unit_of_a_user_lies_in_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    path, commands = unit_path()
    assert path == tmp_path / "systemd" / "user" / "azu-join.service"
    assert commands[1:] == ("systemctl --user enable --now azu-join", "loginctl enable-linger")

    monkeypatch.setattr("os.geteuid", lambda: 0)
    path, commands = unit_path()
    assert path == Path("/etc/systemd/system/azu-join.service")
    assert commands == ("systemctl daemon-reload", "systemctl enable --now azu-join")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "azu-join.service"
    unit.write_text(unit_text((sys.executable, "-c", "1", "%h $x"), tmp_path, of_root=True))
    done = subprocess.run(
        ("systemd-analyze", "verify", "--man=no", str(unit)), capture_output=True, text=True, timeout=60
    )

    assert [line for line in done.stderr.splitlines() if "azu" in line] == []
