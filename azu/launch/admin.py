"""The admin's access to the network that runs on this machine: its URL and key, kept in a file."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from azu.config import ControlConfig, NodeLinks
from azu.config.settings import configuration_error
from azu.errors import NotFound
from azu.files import write_private
from azu.launch.membership import EnrolmentTicket

if TYPE_CHECKING:
    from azu.money.books import Members

T = TypeVar("T")

_FILE = "admin.json"


@dataclass(frozen=True, slots=True)
class AdminFacts:
    """A network's URL, its id, its admin key and, if it is encrypted, the file of the ingress's certificate.

    `nodes` says how its nodes are linked, `domain` where other machines reach the ingress, `why_one_user` why
    one Unix user runs money and Ray, if it does.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", hide_input_in_errors=True)

    url: str
    admin_key: str = field(repr=False)
    network_id: str
    domain: str
    certificate: Path | None
    nodes: NodeLinks
    why_one_user: str

    @classmethod
    def of(cls, config: ControlConfig, url: str, admin_key: str, why_one_user: str) -> "AdminFacts":
        """Return the facts of a configuration; `url` is that of the ingress on this machine."""
        return cls(
            url=url,
            admin_key=admin_key,
            network_id=config.network_id,
            domain=config.domain,
            certificate=None if config.tls is None else config.tls.certificate,
            nodes=config.nodes,
            why_one_user=why_one_user,
        )


_FACTS = TypeAdapter(AdminFacts)


@contextmanager
def admin_file_kept(home: Path, facts: AdminFacts) -> Iterator[None]:
    """Keep a network's facts in a file of its home during the block."""
    write_private(home / _FILE, _FACTS.dump_json(facts).decode())
    try:
        yield
    finally:
        (home / _FILE).unlink(missing_ok=True)


def admin_facts(home: Path) -> AdminFacts:
    """Return the access to the network that runs out of a home folder; raises NotFound when none runs."""
    try:
        return _FACTS.validate_json((home / _FILE).read_bytes())
    except FileNotFoundError as error:
        raise NotFound(f"no network runs in {home}") from error
    except ValidationError as error:
        raise configuration_error(error, str(home / _FILE)) from error


def new_ticket(
    money_home: Path, facts: AdminFacts, *, label: str, uses: int, host: str, expires_in_s: int
) -> EnrolmentTicket:
    """Make a ticket that admits `uses` nodes, whose addresses are in the range `host`."""
    secret, record = ask_members(
        money_home, lambda members: members.new_ticket(label, uses, host, expires_in_s)
    )
    return EnrolmentTicket(
        url=f"https://{facts.domain}", network=facts.network_id, secret=secret, host=record.host
    )


def ask_members(money_home: Path, ask: "Callable[[Members], Awaitable[T]]") -> T:
    """Ask the books of this machine's network, as their owner, about its tickets."""
    from azu.launch.sidecars import books_access
    from azu.money.books import Members

    async def asked() -> T:
        members = Members(books_access(money_home).url("owner"))
        try:
            return await ask(members)
        finally:
            await members.close()

    return asyncio.run(asked())
