"""The azu command: the composition root."""

import os
import sys
from importlib import import_module

import typer

from azu.errors import AzuError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pool GPUs into one network that runs large language models, paid per token and layer.",
)
# Module and function of every command, in the order of the help text. The modules are light to import.
_COMMANDS = (
    ("demo", "demo"),
    ("up", "up"),
    ("serve", "serve"),
    ("join", "join"),
    ("leave", "leave"),
    ("down", "down"),
    ("account", "login"),
    ("account", "deposit"),
    ("withdraw", "withdraw"),
    ("account", "balance"),
    ("prompt", "prompt"),
    ("prompt", "jobs"),
    ("receipt", "receipt"),
    ("ps", "ps"),
    ("top", "top"),
    ("ps", "models"),
    ("account", "earnings"),
    ("shard", "shard"),
    ("plan", "plan"),
    ("check", "check"),
    ("doctor", "doctor"),
    ("bench", "bench"),
    ("treasury", "treasury"),
    ("devnet", "devnet"),
)
_GROUPS = (("wallet", "wallet"), ("keys", "keys"), ("ledger", "ledger"), ("ticket", "ticket"))

for _module, _function in _COMMANDS:
    app.command()(getattr(import_module(f"azu.cli.{_module}"), _function))
for _module, _group in _GROUPS:
    app.add_typer(getattr(import_module(f"azu.cli.{_module}"), _group), name=_group)


def main() -> None:
    """Run the command line: an AzuError is one line on stderr and exit 1, Ctrl-C exit 130."""
    try:
        app()
    except AzuError as error:
        _tell(error)
        _end(1)
    except SystemExit as ending:
        _end(ending.code if isinstance(ending.code, int) else 0)


def _end(status: int) -> None:
    """End this process; whatever a command started was stopped when the command returned."""
    if "ray" in sys.modules:
        # Seen after a node had died: Ray breaks the interpreter's list of objects, through which the last
        # collection then walks in a circle for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _tell(error: AzuError) -> None:
    """Say an error to a person on stderr, or to a program on stdout."""
    import json

    from rich.console import Console
    from rich.text import Text

    if "--json" in sys.argv:
        typer.echo(json.dumps(error.to_openai()))
    else:
        Console(stderr=True).print(Text(error.message, style="red"), soft_wrap=True)
