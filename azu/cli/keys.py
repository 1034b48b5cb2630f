"""`azu keys new|list|revoke`: the API keys of an address."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from azu.cli.account import Days, Limit, key_bounds
from azu.cli.credentials import open_client
from azu.cli.output import AsJson, Exact, Listing, amount, show, table, unit

if TYPE_CHECKING:
    from azu.api.accounts import KeyLine


keys = typer.Typer(no_args_is_help=True)


@keys.command()
def new(
    label: Annotated[str, typer.Option(help="A name for the key, to tell it from others.")] = "",
    limit: Limit = None,
    days: Days = None,
    as_json: AsJson = False,
) -> None:
    """Open one more key with the wallet's signature and print it; this machine goes on with its own."""
    from azu.cli.wallet import unlock
    from azu.config import Settings

    client = open_client()
    bounds = key_bounds(limit, days)
    opened = client.login(unlock(Settings.from_environment().home), label=label, **bounds)
    show({"api_key": opened}, as_json, lambda _: opened)


@keys.command("list")
def list_(exact: Exact = False, as_json: AsJson = False) -> None:
    """Show the keys of this machine's address, with their limits."""
    show(open_client().api_keys(), as_json, lambda found: _drawn(found, exact))


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `azu keys list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Make a key invalid at once."""
    open_client().revoke_key(key_id)
    show({"revoked": key_id}, as_json, lambda _: f"{key_id} is revoked")


def _drawn(found: "list[KeyLine]", exact: bool = False) -> Listing:
    rows = [
        (
            key.key_id,
            key.label,
            _day(key.created_at_ms),
            "never" if key.expires_at_ms is None else _day(key.expires_at_ms),
            amount(key.spend_limit_lamports, exact),
            amount(key.spent_lamports, exact),
            amount(key.day_limit_lamports, exact),
            amount(key.spent_today_lamports, exact),
        )
        for key in found
    ]
    heads = ["key", "label", "opened", "ends", f"limit, {unit(exact)}", f"spent {unit(exact)}"]
    return table([*heads, f"limit of a day, {unit(exact)}", f"today {unit(exact)}"], rows)


def _day(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_ms / 1000))
