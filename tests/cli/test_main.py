"""How commands end: with text for people, JSON for programs, and an exit status for both."""

import json
import os
import signal
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from azu import cli
from tests.client.ingress import Reply, running_ingress


def azu(*arguments: str, home: Path, given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with `given` as its standard input."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
    return subprocess.run(
        [sys.executable, "-m", "azu.cli", *arguments],
        env=kept | {"AZU_HOME": str(home), "AZU_URL": "http://127.0.0.1:9", "COLUMNS": "200"} | environment,
        input=given,
        capture_output=True,
        text=True,
        timeout=300,
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

    assert done.stderr == "no [/red] here. Next: `azu balance -h` says what it takes\n"


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


@pytest.mark.parametrize("words", [("-h",), ("ps", "-h"), ("keys", "list", "-h")])
def test_every_command_has_the_short_option_for_its_help(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli.app, [*words])

    assert (done.exit_code, "Usage: " in done.output) == (0, True)


def test_the_help_of_all_says_of_each_command_what_its_own_help_begins_with() -> None:
    group = typer.main.get_group(cli.app)

    lines = {name: command.help for name, command in group.commands.items()}
    assert lines == {name: (cli.loaded(name).help or "").partition("\n\n")[0] for name in lines}


def test_the_version_is_that_of_the_installed_package() -> None:
    assert CliRunner().invoke(cli.app, ["--version"]).output == f"azu {version('azu')}\n"


def test_a_shell_completes_commands() -> None:
    asked = {"_ROOT_COMPLETE": "complete_bash", "COMP_WORDS": "azu ba", "COMP_CWORD": "1"}

    assert CliRunner().invoke(cli.app, env=asked, prog_name="root").output.split() == ["balance"]


@pytest.mark.parametrize("background", [(), ("--background",)])
def test_a_network_on_a_taken_port_is_refused_in_one_line_before_anything_starts(
    tmp_path: Path, background: tuple[str, ...]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = azu("up", *background, home=tmp_path, AZU_HTTP_PORT=str(port))

    assert done.returncode == 1
    assert done.stderr == f"port {port} is taken by another program: set AZU_HTTP_PORT\n"
    assert not list(tmp_path.glob("logs/*")), "the file of each process that was started"


def test_a_home_that_cannot_be_written_is_one_line_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    done = azu("wallet", "new", home=tmp_path / "file" / "home", AZU_WALLET_PASSWORD="x")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{tmp_path}/file/home: Not a directory; set AZU_HOME to a folder\n"


def test_a_full_disk_is_one_line_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write() -> None:
        with open("/dev/full", "w") as full:
            full.write("x")

    monkeypatch.setattr(cli, "app", write)

    with pytest.raises(SystemExit, match="1"):
        cli.main()

    assert capsys.readouterr().err.startswith("No space left on device; make room on the disk")


@pytest.mark.prove
def test_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "azu.cli", "devnet", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("devnet ready ")

    process.send_signal(signal.SIGINT)

    # Python starts and ends slowly on a busy machine.
    assert process.wait(90) == 130
