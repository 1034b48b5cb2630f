"""`azu ticket new|list|revoke`: the tickets with which machines join an encrypted network."""

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from azu.cli.output import AsJson, show, table

if TYPE_CHECKING:
    from azu.api.network import TicketResponse


_HOUR_S = 3600

ticket = typer.Typer(no_args_is_help=True, help="Tickets of an encrypted network: a machine joins with one.")


@ticket.command()
def new(
    label: Annotated[str, typer.Option(help="The person or machine that it is for.")] = "",
    uses: Annotated[int, typer.Option(min=1, max=1000, help="How many machines it admits.")] = 1,
    hours: Annotated[int, typer.Option(min=1, max=720, help="How many hours it is valid.")] = 24,
    as_json: AsJson = False,
) -> None:
    """Make a ticket; give it only to people who may run programs on your machines."""
    from azu.config import Settings
    from azu.launch.admin import admin_client, new_ticket

    client = admin_client(Settings.from_environment())
    made = new_ticket(client, label=label, uses=uses, expires_in_s=hours * _HOUR_S)
    show({"ticket": made.encode()}, as_json, lambda facts: facts["ticket"])


@ticket.command("list")
def list_(as_json: AsJson = False) -> None:
    """Show the tickets and the machines that joined with them."""
    from azu.config import Settings
    from azu.launch.admin import admin_client

    show(admin_client(Settings.from_environment()).tickets(), as_json, _drawn)


@ticket.command()
def revoke(
    ticket_id: Annotated[str, typer.Argument(help="The ticket's id, as `azu ticket list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Make a ticket invalid; the machines that joined with it cannot join again."""
    from azu.config import Settings
    from azu.launch.admin import admin_client

    admin_client(Settings.from_environment()).revoke_ticket(ticket_id)
    show({"revoked": ticket_id}, as_json, lambda _: f"{ticket_id} is revoked")


def _drawn(found: "list[TicketResponse]") -> Table:
    rows = [
        (
            one.ticket_id,
            one.label,
            f"{len(one.nodes)} of {one.uses}",
            "revoked" if one.revoked_at_ms is not None else _minute(one.expires_at_ms),
            ", ".join(one.nodes),
        )
        for one in found
    ]
    return table(["ticket", "label", "used", "ends", "machines"], rows)


def _minute(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_ms / 1000))
