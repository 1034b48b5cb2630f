"""API keys on this machine: one file that only its owner can read, a key per network."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from azu.config import Settings
from azu.errors import ConfigurationError, Unauthenticated

if TYPE_CHECKING:
    from azu.client import Client

_FILE = "credentials.json"


@dataclass(frozen=True, slots=True)
class Credential:
    """A key, the address it spends from, and the platform's address when the key was opened."""

    api_key: str
    address: str
    platform: str


def load_credential(home: Path, url: str) -> Credential:
    """Return this machine's key for a network; raises Unauthenticated when there is none."""
    found = _read(home / _FILE).get(url)
    if found is None:
        raise Unauthenticated(f"no key for {url} on this machine; run `azu login`")
    return Credential(**found)


def store_credential(home: Path, url: str, credential: Credential) -> Path:
    """Keep a key for a network, in place of an older one; returns the file."""
    path = home / _FILE
    known = _read(path)
    known[url] = asdict(credential)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(known, file, indent=1)
    temporary.rename(path)
    return path


def known_platform() -> str:
    """Return the address of AZU_URL's platform without asking it.

    That is HYPERLIQUID_ADDRESS, or what the network said at the login.
    """
    settings = Settings.from_environment()
    return settings.platform_address or load_credential(settings.home, settings.url).platform


def open_client() -> "Client":
    """Return a client of AZU_URL with AZU_API_KEY or this machine's key for it."""
    from azu.client import Client

    settings = Settings.from_environment()
    if settings.api_key is not None:
        return Client(settings.url, settings.api_key.get_secret_value())
    return Client(settings.url, load_credential(settings.home, settings.url).api_key)


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        known = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigurationError(f"{path} is damaged; remove it and run `azu login`") from error
    if not isinstance(known, dict):
        raise ConfigurationError(f"{path} is damaged; remove it and run `azu login`")
    return known
