"""`azu pause`, `azu resume`: take a node's device back for a while, and lend it again."""

import time
from typing import Annotated

import typer
from rich.text import Text

from azu.cli.credentials import open_client
from azu.cli.output import AsJson, console, done, show

_POLL_S = 0.5

Name = Annotated[str, typer.Argument(help="The node's name or the beginning of its id; see `azu ps`.")]
WaitOption = Annotated[float, typer.Option(min=0, help="How many seconds to wait until it holds nothing.")]


def pause(name: Name, patience: WaitOption = 300.0, as_json: AsJson = False) -> None:
    """Move the pieces of a node of yours to other nodes, and give it no new ones until `azu resume`.

    Its `azu join` goes on. A piece that no other node has room for stays while it has jobs.
    """
    client = open_client()
    deadline = time.monotonic() + patience
    with console.status(Text(f"Moving the pieces of {name}")):
        while not (empty := client.pause(name)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    holds = "holds nothing" if empty else "still holds pieces: no other node has room, and they have jobs"
    told = done(f"{name} is paused and {holds}")
    show({"name": name, "paused": True, "empty": empty}, as_json, lambda _: told)


def resume(name: Name, as_json: AsJson = False) -> None:
    """Have a paused node of yours lend again, as far as the hours and limits of its `azu join` allow it."""
    open_client().resume(name)
    show({"name": name, "paused": False}, as_json, lambda _: done(f"{name} lends again"))
