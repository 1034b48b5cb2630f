"""The admin's access to the network that runs on this machine: its URL and key, kept in a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ConfigDict, TypeAdapter, ValidationError

from azu.config import Settings, TlsConfig
from azu.config.settings import configuration_error
from azu.errors import NotFound
from azu.files import write_private
from azu.launch.membership import EnrolmentTicket

if TYPE_CHECKING:
    from azu.client import Client


_FILE = "admin.json"
_FIRST_TICKET_S = 86_400


@dataclass(frozen=True, slots=True)
class AdminFacts:
    """A network's URL, its admin key and, if it is encrypted, the file of the ingress's certificate."""

    __pydantic_config__ = ConfigDict(extra="forbid", hide_input_in_errors=True)

    url: str
    admin_key: str = field(repr=False)
    certificate: Path | None = None


_FACTS = TypeAdapter(AdminFacts)


@contextmanager
def admin_file_kept(home: Path, url: str, admin_key: str, tls: TlsConfig | None) -> Iterator[None]:
    """Keep a network's URL and admin key in a file of its home during the block."""
    facts = AdminFacts(url, admin_key, None if tls is None else tls.certificate)
    write_private(home / _FILE, _FACTS.dump_json(facts).decode())
    try:
        yield
    finally:
        (home / _FILE).unlink(missing_ok=True)


def admin_client(settings: Settings) -> "Client":
    """Return a client with AZU_ADMIN_KEY at AZU_URL, or with the key of the network that runs here.

    Raises NotFound when there is neither.
    """
    from azu.client import Client
    from azu.client.http import trusting_this

    if settings.admin_key is not None:
        return Client(settings.url, settings.admin_key.get_secret_value())
    facts = admin_facts(settings.home)
    tls = None if facts.certificate is None else trusting_this(facts.certificate)
    return Client(facts.url, facts.admin_key, tls=tls)


def admin_facts(home: Path) -> AdminFacts:
    """Return the access to the network that runs out of a home folder; raises NotFound when none runs."""
    try:
        return _FACTS.validate_json((home / _FILE).read_bytes())
    except FileNotFoundError as error:
        raise NotFound(f"no network runs in {home}, and AZU_ADMIN_KEY is not set") from error
    except ValidationError as error:
        raise configuration_error(error, str(home / _FILE)) from error


def new_ticket(client: "Client", *, label: str, uses: int, expires_in_s: int) -> EnrolmentTicket:
    """Make a ticket that admits `uses` nodes."""
    response = client.new_ticket(label=label, uses=uses, expires_in_s=expires_in_s)
    return EnrolmentTicket(url=response.url, network=response.network_id, secret=response.secret)


def first_ticket(client: "Client") -> EnrolmentTicket:
    """Return the ticket that `azu up` prints: it admits one node within a day."""
    return new_ticket(client, label="printed by azu up", uses=1, expires_in_s=_FIRST_TICKET_S)
