from azu.cli.output import Terminal, table


def test_an_id_stays_on_one_line_of_a_narrow_terminal() -> None:
    job_id = "cmpl-0123456789abcdef0123456789abcdef"
    columns = ["job", "model", "status", "created", "charged lamports", "released lamports", "error"]
    row = [
        job_id,
        "azu/tiny-dense",
        "failed",
        "2026-11-25 12:00:00",
        12_345,
        678_901,
        "no worker has room left",
    ]
    console = Terminal(width=80)

    with console.capture() as captured:
        console.print(table(columns, [row]))

    assert job_id in captured.get()
