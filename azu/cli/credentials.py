"""API keys on this machine: one file that only its owner can read, a key per network."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ConfigDict, TypeAdapter, ValidationError

from azu.config import Settings
from azu.errors import ConfigurationError, Unauthenticated
from azu.files import read_json, write_private

if TYPE_CHECKING:
    import ssl

    from azu.client import Client


_FILE = "credentials.json"


@dataclass(frozen=True, slots=True)
class Credential:
    """A key, the address it spends from, and the network's platform and authority when it was opened.

    `network_id` is the id that the user gave at the login, empty where the network was believed.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    api_key: str
    address: str
    platform: str
    network_id: str = ""
    authority: str | None = None


def load_credential(home: Path, url: str) -> Credential:
    """Return this machine's key for a network; raises Unauthenticated when there is none."""
    found = stored_credential(home, url)
    if found is None:
        raise Unauthenticated(f"no key for {url} on this machine; run `azu login`")
    return found


def stored_credential(home: Path, url: str) -> Credential | None:
    """Return what this machine knows of a network since its login there, None before that."""
    return _read(home / _FILE).get(url.rstrip("/"))


def store_credential(home: Path, url: str, credential: Credential) -> Path:
    """Keep a key for a network, in place of an older one; returns the file."""
    path = home / _FILE
    known = _read(path)
    known[url.rstrip("/")] = credential
    write_private(path, _KNOWN.dump_json(known, indent=1).decode())
    return path


def known_platform() -> str:
    """Return the address of AZU_URL's platform without asking the network.

    It is HYPERLIQUID_ADDRESS, or the address that the network gave at the login.
    """
    settings = Settings.from_environment()
    return settings.platform_address or load_credential(settings.home, settings.url).platform


def open_client() -> "Client":
    """Return a client of AZU_URL with AZU_API_KEY or this machine's key for it.

    It uses the platform that this machine knows, and no other.
    """
    from azu.client import Client

    settings = Settings.from_environment()
    known = stored_credential(settings.home, settings.url)
    if settings.api_key is not None:
        api_key = settings.api_key.get_secret_value()
    else:
        api_key = (known or load_credential(settings.home, settings.url)).api_key
    pinned = None if known is None else known.platform
    platform = settings.platform_address or pinned
    return Client(settings.url, api_key, tls=trust_at(settings), platform=platform)


def trust_at(settings: Settings) -> "ssl.SSLContext | None":
    """Return which certificates to trust at AZU_URL; None for those of the system."""
    from azu.client.http import trusting, trusting_only

    if settings.tls_ca is not None:
        return trusting(settings.tls_ca)
    known = stored_credential(settings.home, settings.url)
    return None if known is None or known.authority is None else trusting_only(known.authority)


def _read(path: Path) -> dict[str, Credential]:
    if not path.exists():
        return {}
    try:
        return _KNOWN.validate_python(read_json(path))
    except (ConfigurationError, ValidationError):
        # Without the cause: it would quote the keys.
        raise ConfigurationError(f"{path} is damaged; remove it and run `azu login`") from None


_KNOWN = TypeAdapter(dict[str, Credential])
