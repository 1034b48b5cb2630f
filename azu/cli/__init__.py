"""The azu command and its subcommands, one light module each."""

import errno
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from azu.errors import AzuError, Unavailable

# What is behind each command, in the order of the help text: the module, and the first line of its help. A
# module holds the command as a function, or the group as a Typer, of this name.
_COMMANDS = {
    "demo": (
        "demo",
        "Run the whole network on this machine: cut, place, deposit, prompt, stream, settle, receipt.",
    ),
    "up": (
        "up",
        "Run a network on this machine until Ctrl-C or `azu down`; prints its address, ticket and admin key.",
    ),
    "serve": (
        "serve",
        "Run a network on this machine's Ray head until Ctrl-C, `azu down` or the end of the head.",
    ),
    "join": (
        "join",
        "Lend this machine until Ctrl-C: one Ray node for each GPU, started again when it dies.",
    ),
    "leave": (
        "leave",
        "Move the pieces of a node of yours to other nodes; when it holds none, end its `azu join`.",
    ),
    "pause": (
        "pause",
        "Move the pieces of a node of yours to other nodes, and give it no new ones until `azu resume`.",
    ),
    "resume": (
        "pause",
        "Have a paused node of yours lend again, as far as the hours and limits of its `azu join` allow it.",
    ),
    "down": ("down", "Stop the network that runs out of AZU_HOME, and everything that it started."),
    "login": (
        "account",
        "Open an API key with the wallet's signature and keep it on this machine, with the network's id.",
    ),
    "deposit": ("account", "Move HYPE from the wallet to the platform and wait for the credit."),
    "withdraw": ("withdraw", "Send HYPE of your balance back to the wallet; exit 0 once the chain shows it."),
    "balance": ("account", "Show what the key's address can spend and what its running jobs have reserved."),
    "prompt": (
        "prompt",
        "Send a prompt, stream the answer and print the receipt. Ctrl-C ends the job; its tokens are paid.",
    ),
    "chat": (
        "chat",
        "Talk with a model: each question goes out with all that was said before. /quit or Ctrl-D ends it.",
    ),
    "quote": (
        "quote",
        "Show what an answer would cost at most, and if it is as long as your last ones; nothing is asked.",
    ),
    "jobs": (
        "jobs",
        "Show the address's jobs with their errors and charges, or as CSV; or delete the texts of one.",
    ),
    "receipt": (
        "receipt",
        "Show what a job cost and which workers earned it, signed by the platform; or check such a receipt.",
    ),
    "dispute": (
        "dispute",
        "Have what workers and platform got for a job be held, before they are paid; your wallet signs that.",
    ),
    "ps": (
        "ps",
        "Show what does not run as it should, the nodes, their VRAM, and where the pieces of each model are.",
    ),
    "top": (
        "top",
        "Show speed, queue, KV blocks and live VRAM until Ctrl-C; with --once or --json one sample.",
    ),
    "models": (
        "models",
        "Show the models that are here: price, longest text, state, and the speed that was measured.",
    ),
    "earnings": (
        "account",
        "Show what the key's address earned by lending, what is being paid and what was paid.",
    ),
    "shard": (
        "shard",
        "Cut a model into one file per layer, router and expert; a cut that was interrupted is resumed.",
    ),
    "plan": ("plan", "Show where a model's pieces would go; a model that is not cut yet is cut first."),
    "check": (
        "check",
        "Cut a model, run it stage by stage and whole, and compare; exit 0 only if the answers are equal.",
    ),
    "doctor": (
        "doctor",
        "Check this machine and the network that it runs or uses; exit 1 when something is bad.",
    ),
    "bench": (
        "bench",
        "Measure azu beside transformers, cp and Redis; exit 1 when a target is missed. Takes some minutes.",
    ),
    "books": ("books", "Keep the books until stopped; the only process with rights on the ledger in Redis."),
    "signer": (
        "signer",
        "Sign payouts until stopped; the only process that reads the platform's private key.",
    ),
    "devnet": (
        "devnet",
        "Run a local chain that speaks Hyperliquid's HTTP API; without a file it forgets all when it stops.",
    ),
    "wallet": ("wallet", "The key that pays, on this machine."),
    "keys": ("keys", "The API keys of your address; `azu login` opens one."),
    "ledger": ("ledger", "The books: check them, repair their file, decide about held money."),
    "treasury": ("treasury", "Credit deposits, pay workers and users; the verbs are for the admin."),
    "ticket": ("ticket", "Tickets of an encrypted network: a machine joins with one."),
}
_GROUPS = ("wallet", "keys", "ledger", "treasury", "ticket")


class _Commands(TyperGroup):
    """The commands of azu, each imported when it is called: the help and the completion need none of them."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands = {name: TyperCommand(name, help=line) for name, (_, line) in _COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return a command as it can be called, of the name that comes first, and the arguments after it."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, None if command is None else loaded(command.name or ""), rest


def loaded(name: str) -> Any:
    """Return a command, or a group of commands, with its options."""
    module, line = _COMMANDS[name]
    found, around = getattr(import_module(f"azu.cli.{module}"), name), typer.Typer()
    if isinstance(found, typer.Typer):
        around.add_typer(found, name=name, help=line)
    else:
        around.command(name)(found)
    return typer.main.get_group(around).commands[name]


app = typer.Typer(
    cls=_Commands,
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
    is_grouped = words[:1] and words[0] in _GROUPS
    return " ".join(words[: 2 if is_grouped else 1])
