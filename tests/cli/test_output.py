"""What the commands print fits a terminal of 80 columns, and amounts are in HYPE."""

import pytest
from rich.console import RenderableType

from azu.api.accounts import BalanceResponse, KeyLine
from azu.api.jobs import JobLine
from azu.api.network import DeploymentLine, NetworkResponse, NodeLine, PieceLine
from azu.api.openai import ModelLine
from azu.cli import account, jobs, keys, models, ps, top
from azu.cli.output import ProgressPrinter, Terminal, amount, table, unit
from azu.units import GIB

JOB = "cmpl-0123456789abcdef0123456789abcdef"
ADDRESS = "0x" + "a1" * 20


def drawn(renderable: RenderableType, width: int = 80) -> str:
    console = Terminal(width=width, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def network() -> NetworkResponse:
    nodes = [
        NodeLine(
            node_id=f"{index}" * 56, name=name, payout_address=ADDRESS, state="alive", device="cuda:0",
            vram_total_bytes=80 * GIB, vram_free_bytes=13 * GIB, vram_used_bytes=66 * GIB, cached_shards=12,
        )
        for index, name in ((1, "a-machine-with-a-long-name-0"), (2, "vm"), (3, "vm"))
    ]  # fmt: skip
    piece = PieceLine(node="vm", actor="stage-0", layers=(0, 6), experts={2: tuple(range(40))})
    model = DeploymentLine(
        model_id="azu/tiny-dense", revision="r", state="running", epoch=1, num_layers=6, topology=(piece,)
    )
    return NetworkResponse(nodes=nodes, deployments=(model,))


def job() -> JobLine:
    return JobLine(
        job_id=JOB, model="azu/tiny-dense", status="done", created_at_ms=0, reserved_lamports=0,
        finish_reason="stop", charged_lamports=16_000, released_lamports=123_456_789, error=None,
    )  # fmt: skip


def model() -> ModelLine:
    return ModelLine(
        id="azu/tiny-dense", owned_by="azu", context_length=9000, max_model_len=9000, num_layers=6,
        lamports_per_token=12, deployed=True, state="running", tokens_per_s=83.21,
    )  # fmt: skip


NARROW = {
    "ps": (
        lambda: ps._network(network()),
        ["80.0 GiB", "13.0 GiB", "66.0 GiB", ADDRESS, "azu/tiny-dense", "0 to 39"],
    ),
    "top": (
        lambda: top._screen(top.Sample(network(), {"azu/tiny-dense": top.Speed(41.25, 1.5, 0.0312, None)})),
        ["80.0 GiB", "13.0 GiB", "66.0 GiB", "41.2", "1.50 s", "31.2 ms"],
    ),
    "models": (lambda: models.drawn([model()], exact=False), ["azu/tiny-dense", "0.12", "9,000", "83.2"]),
    "jobs": (lambda: jobs.drawn([job()]), [JOB, "0.00016", "azu/tiny-dense"]),
}


@pytest.mark.parametrize("command", NARROW)
def test_no_line_is_wider_than_the_terminal_and_no_word_is_broken(command: str) -> None:
    draw, words = NARROW[command]

    shown = drawn(draw())

    assert max(map(len, shown.splitlines())) <= 80
    assert [word for word in words if word not in shown] == []
    assert "\u2026" not in shown, "the sign of a text that was cut short"


def test_a_table_that_is_too_wide_is_a_list_with_each_name_beside_its_value() -> None:
    rows = [["ada", "x" * 30, None], ["ben", "y" * 90, 7]]

    wide, narrow = (drawn(table(["node", "what", "free"], rows, title="nodes"), width) for width in (200, 60))

    assert "│ ada" in wide
    lines = [line.rstrip() for line in narrow.splitlines()]
    assert lines[:3] == ["nodes", "node    ada", f"  what  {'x' * 30}"]
    # Nothing stands for what there is not, and what is longer than a line goes on below.
    assert lines[3] == "node    ben"
    assert lines[4:] == [f"  what  {'y' * 52}", f"        {'y' * 38}", "  free  7"]


def test_a_table_of_texts_stays_one_and_goes_on_below() -> None:
    shown = drawn(table(["", "found", "to do"], [["!", "x " * 40, "y " * 40]]), 60)

    assert "│ !" in shown
    assert max(map(len, shown.splitlines())) <= 60
    assert shown.count("x") == 40


def test_numbers_of_experts_are_shown_as_spans() -> None:
    piece = PieceLine(node="vm", actor="a", layers=(0, 6), experts={2: (5, 0, 1, 2, 7, 8), 4: (3,)})

    assert ps._experts(piece) == "layer 2: 0 to 2, 5, 7 to 8; layer 4: 3"


def test_why_a_node_is_paused_is_told_below_the_nodes() -> None:
    found = network()
    paused = found.nodes[0].model_copy(update={"state": "paused", "why_paused": "outside of its hours"})

    shown = drawn(ps._network(found.model_copy(update={"nodes": (paused, *found.nodes[1:])})))

    assert "a-machine-with-a-long-name-0 is paused: outside of its hours" in shown


def test_nodes_of_one_name_are_told_apart_by_their_ids() -> None:
    shown = drawn(ps._network(network()))

    assert "vm (222222222222)" in shown
    assert "vm (333333333333)" in shown
    assert "a-machine-with-a-long-name-0 (" not in shown


@pytest.mark.parametrize(
    ("exact", "shown"), [(False, ("HYPE", "0.00016", "1")), (True, ("lamports", "16000", "100000000"))]
)
def test_amounts_are_in_hype_and_in_lamports_where_that_is_asked_for(
    exact: bool, shown: tuple[str, ...]
) -> None:
    assert (unit(exact), amount(16_000, exact), amount(10**8, exact)) == shown
    assert amount(None, exact) == ""
    found = BalanceResponse(
        address=ADDRESS, available_lamports=16_000, reserved_lamports=10**8, withdrawing_lamports=0
    )
    balance = drawn(account._balance(found, exact)).split()
    assert all(word in balance for word in shown)
    assert ("lamports" in balance) is exact


def test_a_key_shows_its_limit_in_hype() -> None:
    key = KeyLine(
        key_id="k", label="cli", created_at_ms=0, expires_at_ms=None, spend_limit_lamports=2 * 10**7,
        spent_lamports=0,
    )  # fmt: skip

    assert "0.2" in drawn(keys._drawn([key]), 200).split()


def test_an_id_stays_on_one_line_of_a_narrow_terminal() -> None:
    columns = ["job", "model", "status", "created", "charged lamports", "released lamports", "error"]
    row = [JOB, "azu/tiny-dense", "failed", "2026-11-25 12:00:00", 12_345, 678_901, "no worker has room left"]

    assert JOB in drawn(table(columns, [row]))


def test_the_steps_of_another_process_are_shown_as_it_printed_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressPrinter(stderr=True).steps() as step:
        step("Starting Redis")
        step("Waiting until it serves")
    printed = capsys.readouterr().err
    first, second = "Starting Redis", "Waiting until it serves"
    lines = [line.rsplit(" ", 2)[0] if line.startswith("✓") else line for line in printed.splitlines()]
    assert lines == [first, f"✓ {first}", second, f"✓ {second}"]

    with ProgressPrinter().steps_of_another() as line:
        for one in printed.splitlines():
            line(one)
    assert capsys.readouterr().out == printed
