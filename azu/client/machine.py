"""What this machine knows of networks: the one that runs out of its AZU_HOME, and the keys of its logins."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from azu.client.http import trusting_only, trusting_this
from azu.errors import ConfigurationError
from azu.files import read_json, write_private

DEFAULT_HOME = "~/.azu"
_HTTP_PORT = 8000
_CREDENTIALS = "credentials.json"
# azu/launch/admin.py writes it.
_RUNNING = "admin.json"


@dataclass(frozen=True, slots=True)
class Credential:
    """A key, the address it spends from, and the network's platform and authority when it was opened.

    `network_id` is the id that the user gave at the login, empty where the network was believed. `former` are
    the addresses that the platform had before.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    api_key: str
    address: str
    platform: str
    network_id: str = ""
    authority: str | None = None
    former: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunningNetwork:
    """The network that runs out of a home folder; `certificate` is the file of its ingress, if encrypted."""

    __pydantic_config__ = ConfigDict(extra="ignore", hide_input_in_errors=True)

    url: str
    network_id: str
    certificate: Path | None


_KNOWN = TypeAdapter(dict[str, Credential])
_NETWORK = TypeAdapter(RunningNetwork)


def running_network(home: Path) -> RunningNetwork | None:
    """Return the network that runs out of a home folder; None without one, and where it is another user's."""
    path = home / _RUNNING
    try:
        return _NETWORK.validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except ValidationError as error:
        raise ConfigurationError(f"{path} is damaged; run `azu down`, then `azu up`") from error


def network_url(home: Path, http_port: int | str | None = None) -> str:
    """Return where a machine's network is, without a slash at its end, if nothing names one.

    It is the network that runs here, else that of the last login, else the place where `azu up` starts one.
    """
    if (running := running_network(home)) is not None:
        return running.url
    return next(reversed(_read(home / _CREDENTIALS)), f"http://127.0.0.1:{http_port or _HTTP_PORT}")


def trust_at(home: Path, url: str) -> ssl.SSLContext | None:
    """Return the certificates to trust at a URL by what this machine knows; None for those of the system."""
    running, known = running_network(home), stored_credential(home, url)
    if running is not None and running.url == url and running.certificate is not None:
        return trusting_this(running.certificate)
    return None if known is None or known.authority is None else trusting_only(known.authority)


def stored_credential(home: Path, url: str) -> Credential | None:
    """Return what this machine knows of a network since its login there, None before that."""
    return _read(home / _CREDENTIALS).get(url.rstrip("/"))


def store_credential(home: Path, url: str, credential: Credential) -> Path:
    """Keep a key for a network, in place of an older one and as that of the last login; returns the file."""
    path = home / _CREDENTIALS
    known = _read(path)
    known.pop(url.rstrip("/"), None)
    known[url.rstrip("/")] = credential
    write_private(path, _KNOWN.dump_json(known, indent=1).decode())
    return path


def _read(path: Path) -> dict[str, Credential]:
    if not path.exists():
        return {}
    try:
        return _KNOWN.validate_python(read_json(path))
    except (ConfigurationError, ValidationError):
        # Without the cause: it would quote the keys.
        raise ConfigurationError(f"{path} is damaged; remove it and run `azu login`") from None
