"""A network that root starts for other machines: three users, stopped and killed without a trace."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from azu.launch.processes import address_towards, free_port
from azu.launch.unix_users import UnixUser
from tests.cli.test_up import Start, azu, eventually
from tests.unix_users import MONEY, RAY, users_of_tests

__all__ = ["azu"]

pytestmark = pytest.mark.prove

# No packet goes there: the address only chooses the route, and so this machine's own address.
ANYWHERE = "http://192.0.2.1"


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with (
        users_of_tests(tmp_path_factory.mktemp("view")),
        tempfile.TemporaryDirectory(prefix="azu-", dir="/var/tmp", ignore_cleanup_errors=True) as name,
    ):
        Path(name).chmod(0o711)
        yield Path(name)


def programs_of(name: str) -> list[str]:
    """Return the command lines of a user's processes."""
    user, found = UnixUser.find(name), []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            if user and process.uids().real == user.uid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


def test_a_network_of_root_runs_as_three_users_and_leaves_nothing_behind(azu: Start, folder: Path) -> None:
    environment = {
        "AZU_HTTP_PORT": str(free_port()),
        "AZU_USER_HOMES": str(folder / "homes"),
        "AZU_MONEY_USER": MONEY,
        "AZU_RAY_USER": RAY,
    }
    home = folder / "home"

    def up() -> tuple[subprocess.Popen[str], dict[str, str]]:
        options = ("--ip", address_towards(ANYWHERE), "--workers", "1", "--vram", "64MiB", "--json")
        process = azu(home, "up", *options, **environment)
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())

    first, facts = up()
    assert facts["why_one_user"] == ""
    of_money, of_ray = programs_of(MONEY), programs_of(RAY)
    money = ("valkey-server", "azu.cli books", "azu.cli signer", "azu.cli treasury")
    assert all(any(word in line for line in of_money) for word in money)
    assert all(any(word in line for line in of_ray) for word in ("gcs_server", "raylet", "control_process"))
    # The store of jobs holds no money: what breaks into it is Ray's user, as every actor is.
    for of_one in (of_ray, of_money):
        assert sum("valkey-server" in line for line in of_one) == 1
    assert not any("ray" in line for line in of_money)
    # The operator's commands find the money where it is.
    audited = subprocess.run(
        [sys.executable, "-m", "azu.cli", "ledger", "audit", "--json"],
        env={**os.environ, **environment, "AZU_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert audited.returncode == 0, audited.stdout + audited.stderr

    first.kill()
    first.wait(10)

    eventually(lambda: not programs_of(MONEY), 10)
    # Ray's agents try for a minute to report to the dead head.
    eventually(lambda: not programs_of(RAY), 120)
    second, later = up()
    assert later["platform_address"] == facts["platform_address"], "the key is where it was"
    assert azu(home, "down", **environment).wait(120) == 0
    assert second.wait(60) == 130
    assert programs_of(MONEY) + programs_of(RAY) == []
