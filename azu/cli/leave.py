"""`azu leave`: take a node out of the network while its streams go on."""

import time
from typing import Annotated

import typer
from rich.text import Text

from azu.cli.credentials import open_client
from azu.cli.output import AsJson, console, done, show

_POLL_S = 0.5

Name = Annotated[str, typer.Argument(help="The node's name or the beginning of its id; see `azu ps`.")]
WaitOption = Annotated[float, typer.Option(min=0, help="How many seconds to wait.")]


def leave(name: Name, patience: WaitOption = 300.0, as_json: AsJson = False) -> None:
    """Move the pieces of a node of yours to other nodes; when it holds none, end its `azu join`.

    The node gets no new work. Its pieces move while their streams go on, as soon as other nodes have room.
    """
    from azu.errors import DeadlineExceeded

    client = open_client()
    deadline = time.monotonic() + patience
    with console.status(Text(f"Moving the pieces of {name}")):
        while not client.leave(name):
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{name} still holds pieces: no other node has room for them")
            time.sleep(_POLL_S)
    show({"name": name, "left": True}, as_json, lambda _: done(f"{name} holds nothing any more"))
