"""Which network the commands use, and with which key."""

from typing import TYPE_CHECKING

from azu.config import Settings
from azu.errors import Unauthenticated

if TYPE_CHECKING:
    from azu.client import Client


def url_of(settings: Settings) -> str:
    """Return AZU_URL, else where this machine's network is; without a slash at its end."""
    from azu.client.machine import network_url

    return (settings.url or network_url(settings.home, settings.http_port)).rstrip("/")


def no_key(url: str) -> Unauthenticated:
    """Return the error that says how to get a key for a network."""
    return Unauthenticated(f"no key for {url} on this machine; run `azu login`")


def known_platforms() -> tuple[str, ...]:
    """Return the address of the network's platform, then those of before, without asking the network.

    It is HYPERLIQUID_ADDRESS, or the address that the network gave at the login. Those of before are what the
    login or the head's home has.
    """
    from azu.client.machine import stored_credential

    settings = Settings.from_environment()
    url = url_of(settings)
    known = stored_credential(settings.home, url)
    if (platform := settings.platform_address) is not None:
        if known is not None and known.platform == platform:
            return platform, *known.former
        from azu.auth.network_id import PLATFORMS_FILE
        from azu.auth.succession import platforms_of, read_successions

        return platforms_of(platform, read_successions(settings.money_home / PLATFORMS_FILE))
    if known is None:
        raise no_key(url)
    return known.platform, *known.former


def open_client() -> "Client":
    """Return a client of this machine's network with its key; raises Unauthenticated where there is none.

    It uses the platform that this machine knows, and no other.
    """
    from azu.client import Client

    client = Client(platform=Settings.from_environment().platform_address)
    if not client.has_key:
        raise no_key(client.url)
    return client
