"""How a network is reached: ports, the cluster's token and the admin key, the same at each of its starts."""

import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from azu.config import Settings
from azu.config.settings import configuration_error
from azu.errors import NotFound
from azu.files import write_private
from azu.launch.processes import free_port

_FILE = "access.json"


@dataclass(frozen=True, slots=True)
class KeptAccess:
    """The ports of Ray's head and of the ingress, the cluster's token and the admin key.

    0 and an empty text stand for what the next start chooses.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", hide_input_in_errors=True)

    head_port: int = 0
    http_port: int = 0
    token: str = field(default="", repr=False)
    admin_key: str = field(default="", repr=False)


_FORMAT = TypeAdapter(KeptAccess)


def kept_access(settings: Settings, *, new_token: bool = False) -> KeptAccess:
    """Return how the network of a home folder is reached, as at its last start.

    A port that another process has now is replaced by a free one. `new_token` replaces the token and the
    admin key. A port and an admin key of the settings come first; the key is not kept. Raises
    ConfigurationError for a damaged file.
    """
    known = _read(settings.home)
    if new_token:
        known = replace(known, token="", admin_key="")
    access = KeptAccess(
        head_port=free_port(known.head_port),
        http_port=settings.http_port or free_port(known.http_port),
        token=known.token or secrets.token_hex(32),
        admin_key=known.admin_key or f"azu-admin-{secrets.token_urlsafe(32)}",
    )
    _write(settings.home, access)
    if settings.admin_key is None:
        return access
    return replace(access, admin_key=settings.admin_key.get_secret_value())


def forget_token(home: Path) -> None:
    """Have the next start of a home folder's network make a new token: who lent with the old one knows it.

    Raises NotFound where no network ever ran.
    """
    if not (home / _FILE).exists():
        raise NotFound(f"no network ever ran in {home}")
    _write(home, replace(_read(home), token=""))


def _read(home: Path) -> KeptAccess:
    path = home / _FILE
    try:
        return _FORMAT.validate_json(path.read_bytes()) if path.exists() else KeptAccess()
    except ValidationError as error:
        raise configuration_error(error, str(path)) from error


def _write(home: Path, access: KeptAccess) -> None:
    write_private(home / _FILE, _FORMAT.dump_json(access).decode())
