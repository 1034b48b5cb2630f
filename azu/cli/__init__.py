"""The azu command and its subcommands, one light module each."""

import errno
import sys
from importlib import import_module
from typing import Annotated

import typer

from azu.errors import AzuError, Unavailable

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Pool GPUs into one network that runs large language models, paid per token and layer.",
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"azu {version('azu')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option("--version", help="Print azu's version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Take what stands before the command's name."""


# Module and function of every command, in the order of the help text. A command imports what is heavy in
# its function.
_COMMANDS = (
    ("demo", "demo"),
    ("up", "up"),
    ("serve", "serve"),
    ("join", "join"),
    ("leave", "leave"),
    ("pause", "pause"),
    ("pause", "resume"),
    ("down", "down"),
    ("account", "login"),
    ("account", "deposit"),
    ("withdraw", "withdraw"),
    ("account", "balance"),
    ("prompt", "prompt"),
    ("chat", "chat"),
    ("quote", "quote"),
    ("jobs", "jobs"),
    ("receipt", "receipt"),
    ("dispute", "dispute"),
    ("ps", "ps"),
    ("top", "top"),
    ("models", "models"),
    ("account", "earnings"),
    ("shard", "shard"),
    ("plan", "plan"),
    ("check", "check"),
    ("doctor", "doctor"),
    ("bench", "bench"),
    ("books", "books"),
    ("signer", "signer"),
    ("devnet", "devnet"),
)
_GROUPS = (
    ("wallet", "wallet"),
    ("keys", "keys"),
    ("ledger", "ledger"),
    ("treasury", "treasury"),
    ("ticket", "ticket"),
)

for _module, _function in _COMMANDS:
    app.command()(getattr(import_module(f"azu.cli.{_module}"), _function))
for _module, _group in _GROUPS:
    app.add_typer(getattr(import_module(f"azu.cli.{_module}"), _group), name=_group)


def main() -> None:
    """Run the command line: an AzuError or a file's error is one line on stderr and exit 1, Ctrl-C is 130."""
    try:
        app()
    except AzuError as error:
        _print_error(error)
        sys.exit(1)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in _OWN:
            raise
        told = f"this command needs: pip install 'azu[node]' ({name} is missing)"
        _print_error(Unavailable(told, code="package_missing"))
        sys.exit(1)
    except OSError as error:
        if error.errno not in _FILE_ADVICE:
            raise
        _print_error(Unavailable(_told(error), code="disk_failed"))
        sys.exit(1)


# What is missing of these is a mistake of azu's own.
_OWN = ("", "azu", "actors", "deployments", "configs")
_MAKE_ROOM = "make room on the disk, or set AZU_HOME to a larger one"
_MAY_WRITE = "you need the right to it, or an AZU_HOME of your own"
_FILE_ADVICE = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EACCES: _MAY_WRITE,
    errno.EPERM: _MAY_WRITE,
    errno.EROFS: _MAY_WRITE,
    errno.ENOTDIR: "set AZU_HOME to a folder",
}


def _told(error: OSError) -> str:
    """Return what a file's error says, with what to do; a write to a full disk names no file."""
    named = "" if error.filename is None else f"{error.filename}: "
    return f"{named}{error.strerror}; {_FILE_ADVICE[error.errno or 0]}"


def _print_error(error: AzuError) -> None:
    """Print an error for people on stderr, or with --json for programs on stdout."""
    import json

    from rich.text import Text

    from azu.cli.advice import with_next_step
    from azu.cli.output import Terminal

    if "--json" in sys.argv:
        typer.echo(json.dumps(error.to_openai()))
    else:
        told = with_next_step(error, _typed())
        Terminal(stderr=True).print(Text(told, style="red"), soft_wrap=True)


def _typed() -> str:
    """Return the name of the command that was typed, with its group's."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    is_grouped = words[:1] and words[0] in (group for _, group in _GROUPS)
    return " ".join(words[: 2 if is_grouped else 1])
