"""Names, ids and errors that others wrote are shown as they are and do nothing to the terminal."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import RenderableType

from azu import cli
from azu.api.accounts import KeyLine
from azu.api.base import ErrorDetail
from azu.api.jobs import JobLine
from azu.api.network import DeploymentLine, NetworkResponse, NodeLine, PieceLine
from azu.api.receipts import ReceiptLines
from azu.cli import keys, ps, receipt, top
from azu.cli.jobs import drawn
from azu.cli.output import Terminal, done, table
from azu.cli.prompt import receipt_panel

# It moves to the top, clears, sets a colour, rings, rubs out and turns the direction of writing.
ACTS = "\x1b[1;1H\x1b[2J\x9b31m\x07\x08\x7f\u202e"
HOSTILE = f"{ACTS}[bold red]paid[/][link=http://evil]:smile:"
NODE = {
    "node_id": "n", "payout_address": "0x1", "state": HOSTILE, "device": HOSTILE, "vram_total_bytes": 1,
    "vram_free_bytes": 1, "cached_shards": 0,
}  # fmt: skip
RECEIPT = {
    "job_id": HOSTILE, "address": "0x1", "revision": HOSTILE, "prompt_tokens": 1, "completion_tokens": 1,
    "num_layers": 1, "lamports_per_token_layer": 2, "charged_lamports": 4, "released_lamports": 0,
    "platform_lamports": 4, "transfer_id": "t", "topology": (), "token_layers": 2,
}  # fmt: skip


def network(name: str) -> NetworkResponse:
    piece = PieceLine(node=name, actor=name, layers=(0, 1))
    return NetworkResponse(
        problems=(name,),
        nodes=(NodeLine.model_validate(NODE | {"name": name}),),
        deployments=(
            DeploymentLine(
                model_id=name, revision="r", state="running", epoch=1, num_layers=1, topology=(piece,)
            ),
        ),
    )


def jobs(name: str) -> list[JobLine]:
    error = ErrorDetail(message=name, type=name, param=None, code=None)
    return [
        JobLine(
            job_id=name, model=name, status=name, created_at_ms=0, reserved_lamports=0, finish_reason=None,
            charged_lamports=None, released_lamports=None, error=error,
        )
    ]  # fmt: skip


def receipt_of(name: str) -> ReceiptLines:
    return ReceiptLines.model_validate(RECEIPT | {"model_id": name, "worker_lamports": {name: 4}})


def key(name: str) -> list[KeyLine]:
    return [
        KeyLine(
            key_id="k", label=name, created_at_ms=0, expires_at_ms=None, spend_limit_lamports=None,
            spent_lamports=0,
        )
    ]  # fmt: skip


SHOWN: dict[str, Callable[[str], RenderableType]] = {
    "ps": lambda name: ps._network(network(name)),
    "top": lambda name: top._screen(top.Sample(network(name), {name: top.Speed(1.0, None, None, None)})),
    "jobs": lambda name: drawn(jobs(name)),
    "receipt": lambda name: receipt_panel(receipt_of(name)),
    "signed by": lambda name: receipt._signed(
        receipt_of("m").model_dump(mode="json") | {"signer": name, "signature": "0x1"}
    ),
    "keys": lambda name: keys._drawn(key(name)),
    "table": lambda name: table(["what", name], [[name, name]], title=name),
    "a line": done,
    "a string": str,
}


def printed(renderable: RenderableType) -> str:
    terminal = Terminal(width=4000, color_system=None, force_terminal=True)
    with terminal.capture() as captured:
        terminal.print(renderable)
    return captured.get()


@pytest.mark.parametrize("what", SHOWN)
def test_a_name_is_shown_and_acts_on_nothing(what: str) -> None:
    shown, plain = printed(SHOWN[what](HOSTILE)), printed(SHOWN[what]("ada"))

    assert not set(shown) & set(ACTS) - set("[1;1H[2J31m")
    assert "[bold red]paid[/][link=http://evil]:smile:" in shown
    assert "\\u001b[2J" in shown
    assert shown.count("\n") == plain.count("\n")


def test_a_model_id_with_a_new_line_stays_on_its_line() -> None:
    one, two = (printed(table(["model"], [[model]])) for model in ("m/one", "m/one\nm/two"))

    assert two.count("\n") == one.count("\n")


def test_azu_writes_no_markup_of_its_own_which_a_terminal_would_show() -> None:
    written = {path.name: path.read_text() for path in Path(cli.__file__).parent.glob("*.py")}

    assert "output.py" in written
    assert [name for name, text in written.items() if re.search(r"\[/\w*\]", text)] == []


def test_an_error_acts_on_nothing() -> None:
    says = f"from azu import cli, errors; cli._print_error(errors.AzuError({HOSTILE!r}))"
    shown = subprocess.run([sys.executable, "-c", says], capture_output=True, text=True, check=True).stderr

    assert "[bold red]paid[/][link=http://evil]:smile:" in shown
    assert not set(shown) & set(ACTS) - set("[1;1H[2J31m")
