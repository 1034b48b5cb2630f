"""`azu prompt`: a question, its answer and its cost."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from azu.cli.credentials import open_client
from azu.cli.output import AsJson, Exact, WaitingLine, amount, console, show, unit

if TYPE_CHECKING:
    from azu.api.jobs import Phase
    from azu.api.receipts import ReceiptLines
    from azu.client import Stream


DIFFERS = "red"


def prompt(
    text: Annotated[str | None, typer.Argument(help="What to ask; - reads it from standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read what to ask from a file.")] = None,
    model: Annotated[str, typer.Option(help="A Hub id or a built-in model.")] = "azu/tiny-dense",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most new tokens to pay for.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 is greedy.")] = None,
    raw: Annotated[bool, typer.Option(help="Take the text as it is, without the chat template.")] = False,
    exact: Exact = False,
    as_json: AsJson = False,
) -> None:
    """Send a prompt, stream the answer and print the receipt. Ctrl-C ends the job; its tokens are paid."""
    question = asked(text, file)
    client = open_client()
    given: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    sampling = {name: value for name, value in given.items() if value is not None}
    stream: Stream[Any]
    if raw:
        stream = client.stream(question, model=model, **sampling)
    else:
        stream = client.chat_stream([{"role": "user", "content": question}], model=model, **sampling)
    for _ in shown(stream, client.url, quiet=as_json):
        pass
    generation = stream.result()
    facts = {"text": generation.text, "generation": generation, "difference": generation.difference}
    found = receipt_panel(generation.receipt, exact), compared(generation.difference)
    show(facts, as_json, lambda _: Group(*found))


def shown(stream: "Stream[Any]", url: str, *, quiet: bool = False) -> Iterator[str]:
    """Print an answer as it comes, and where its job stands while nothing comes; yield its parts."""
    with WaitingLine(quiet=quiet) as line:
        is_amid = False

        def show_phase(phase: "Phase") -> None:
            nonlocal is_amid
            if phase.name == "answering":
                return
            if is_amid and console.is_terminal:
                console.print()  # the line that stands there is the answer's
            is_amid = False
            line.show(phase.text)

        stream.on_phase = show_phase
        line.show(f"Waiting for {url} to take the prompt.")
        for piece in stream:
            line.clear()
            is_amid = True
            if not quiet:
                console.print(Text(piece), end="")
            yield piece
    if not quiet:
        console.print("\n")


def asked(text: str | None, file: Path | None) -> str:
    """Return the text that is asked; raises InvalidRequest unless there is one."""
    from azu.errors import InvalidRequest
    from azu.files import read_text

    if (text is None) == (file is None):
        raise InvalidRequest("give either the text, - for that of standard input, or --file FILE")
    if text is not None and text != "-":
        return text
    # The last line's end is the file's, not the question's.
    return read_text(file or Path("/dev/stdin")).removesuffix("\n")


def compared(differs: str | None) -> Text:
    """Draw what the comparison of a receipt with its answer found."""
    if differs is None:
        return Text("✓ charged for the tokens that came", "green")
    return Text(f"✗ {differs}", DIFFERS)


def receipt_panel(found: "ReceiptLines", exact: bool = False) -> Panel:
    """Draw a receipt, with a bar of who ran which layers."""
    from azu.client.drawing import bar

    def money(lamports: int) -> str:
        return f"{amount(lamports, exact)} {unit(exact)}"

    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(justify="right")
    tokens = f"{found.prompt_tokens} prompt + {found.completion_tokens} completion tokens"
    grid.add_row(f"{tokens} x {found.num_layers} layers", f"{found.token_layers} token-layers")
    grid.add_row("charged", money(found.charged_lamports))
    grid.add_row("released", money(found.released_lamports))
    grid.add_row("platform", money(found.platform_lamports))
    for address, lamports in sorted(found.worker_lamports.items()):
        grid.add_row(f"worker {address}", money(lamports))
    drawn = Group(grid, bar(found)) if found.topology else grid
    return Panel(
        drawn, title=Text(f"{found.model_id}  {found.transfer_id}"), title_align="left", expand=False
    )
