"""How commands end: with text for people, JSON for programs, and an exit status for both."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.client.ingress import Reply, running_ingress


def azu(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
    return subprocess.run(
        [sys.executable, "-m", "azu.cli", *arguments],
        env=kept | {"AZU_HOME": str(home), "AZU_URL": "http://127.0.0.1:9", "COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_error_is_one_line_for_people(tmp_path: Path) -> None:
    done = azu("balance", home=tmp_path)

    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "azu login" in done.stderr


def test_an_error_is_an_object_for_programs(tmp_path: Path) -> None:
    done = azu("balance", "--json", home=tmp_path)

    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["type"] == "authentication_error"
    assert done.stderr == ""


def test_an_unknown_setting_is_named(tmp_path: Path) -> None:
    done = azu("balance", home=tmp_path, AZU_TYPO="x")

    assert done.returncode == 1
    assert "AZU_TYPO" in done.stderr


def test_words_in_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    done = azu("join", "[red]ticket[/]", "--vram", "1GiB", "--payout", "[bold]", home=tmp_path)
    assert done.returncode == 1
    assert "ticket" in done.stderr

    with running_ingress() as ingress:
        ingress.replies["GET /v1/balance"] = Reply(
            {"error": {"message": "no [/red] here", "type": "t", "param": None, "code": None}}, 400
        )
        done = azu("balance", home=tmp_path, AZU_URL=ingress.url, AZU_API_KEY="k")

    assert done.stderr == "no [/red] here\n"


@pytest.mark.parametrize("arguments", [("nonsense",), ("balance", "--nonsense"), ("join",)])
def test_a_wrong_command_line_ends_with_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = azu(*arguments, home=tmp_path)

    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_facts_are_printed_as_json(tmp_path: Path) -> None:
    balance = {"address": "0xa", "available_lamports": 5, "reserved_lamports": 1, "withdrawing_lamports": 2}
    with running_ingress() as ingress:
        ingress.replies["GET /v1/balance"] = Reply(balance)

        done = azu("balance", "--json", home=tmp_path, AZU_URL=ingress.url, AZU_API_KEY="k")

    assert (done.returncode, json.loads(done.stdout)) == (0, balance)


def test_an_empty_home_needs_no_preparation(tmp_path: Path) -> None:
    done = azu("down", home=tmp_path / "not" / "there")

    assert done.returncode == 1
    assert "no network runs" in done.stderr


@pytest.mark.prove
def test_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "azu.cli", "devnet", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("devnet ready ")

    process.send_signal(signal.SIGINT)

    # Python starts and ends slowly on a busy machine.
    assert process.wait(90) == 130
