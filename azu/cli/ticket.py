"""`azu ticket new|list|revoke`, on the head: the tickets with which machines join its network."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from azu.cli.output import AsJson, Listing, show, table

if TYPE_CHECKING:
    from azu.auth.tickets import TicketRecord
    from azu.config import NodeLinks
    from azu.launch.admin import AdminFacts


_HOUR_S = 3600
# The one ticket of a network that no other machine joins; each start of it prints the same.
_LOCAL = "local"

ticket = typer.Typer(no_args_is_help=True)


@ticket.command()
def new(
    host: Annotated[str, typer.Option(help="The machine's address, or a range such as 10.0.0.0/24.")],
    label: Annotated[str, typer.Option(help="The person or machine that it is for.")] = "",
    uses: Annotated[int, typer.Option(min=1, max=1000, help="How many machines it admits.")] = 1,
    hours: Annotated[int, typer.Option(min=1, max=720, help="How many hours it is valid.")] = 24,
    as_json: AsJson = False,
) -> None:
    """Make a ticket; give it only to people who may run programs on your machines."""
    from azu.config import Settings
    from azu.launch.admin import new_ticket

    settings = Settings.from_environment()
    facts = _admitting(settings.home)
    made = new_ticket(
        settings.money_home, facts, label=label, uses=uses, host=host, expires_in_s=hours * _HOUR_S
    )
    show({"ticket": made.encode()}, as_json, lambda facts: facts["ticket"])


@ticket.command("list")
def list_(as_json: AsJson = False) -> None:
    """Show the tickets and the machines that joined with them."""
    from azu.config import Settings
    from azu.launch.admin import ask_members

    settings = Settings.from_environment()
    _admitting(settings.home)
    found = ask_members(settings.money_home, lambda members: members.tickets())
    show([asdict(one) for one in found], as_json, lambda _: _drawn(found))


@ticket.command()
def revoke(
    ticket_id: Annotated[str, typer.Argument(help="The ticket's id, as `azu ticket list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Make a ticket invalid; the machines that joined with it cannot join again.

    They know the network's token: its next start makes a new one.
    """
    from azu.config import NodeLinks, Settings
    from azu.errors import NotFound
    from azu.launch.admin import ask_members
    from azu.launch.kept_access import forget_token

    settings = Settings.from_environment()
    if ticket_id != _LOCAL:
        _admitting(settings.home)
        ask_members(settings.money_home, lambda members: members.revoke_ticket(ticket_id))
    elif (nodes := _nodes(settings.home)) is not None and nodes is not NodeLinks.LOCAL:
        raise NotFound(
            f"the network that runs here has no ticket `{_LOCAL}`: `azu ticket list` shows its tickets"
        )
    forget_token(settings.home)
    told = f"{ticket_id} is revoked; the network's next start makes a new token"
    show({"revoked": ticket_id}, as_json, lambda _: told)


def _nodes(home: Path) -> "NodeLinks | None":
    """Return how the nodes of the network that runs here are linked, None where none runs."""
    from azu.errors import NotFound
    from azu.launch.admin import admin_facts

    try:
        return admin_facts(home).nodes
    except NotFound:
        return None


def _admitting(home: Path) -> "AdminFacts":
    """Return the facts of the network that runs here; raises NotFound unless it admits other machines."""
    from azu.config import NodeLinks
    from azu.errors import NotFound
    from azu.launch.admin import admin_facts

    facts = admin_facts(home)
    if facts.nodes is NodeLinks.FOREIGN:
        raise NotFound("azu did not start this Ray cluster: its owner adds nodes to it, without tickets")
    if facts.nodes is NodeLinks.LOCAL:
        raise NotFound(
            f"the network that runs here has one ticket, `{_LOCAL}`, for this machine alone; "
            "`azu up --ip ADDRESS` admits others"
        )
    return facts


def _drawn(found: "Sequence[TicketRecord]") -> Listing:
    rows = [
        (
            one.ticket_id,
            one.label,
            one.host,
            f"{len(one.nodes)} of {one.uses}",
            "revoked" if one.revoked_at_ms is not None else _minute(one.expires_at_ms),
            ", ".join(sorted(node.name for node in one.nodes.values())),
        )
        for one in found
    ]
    return table(["ticket", "label", "for", "used", "ends", "machines"], rows)


def _minute(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_ms / 1000))
