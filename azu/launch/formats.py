"""The format of what azu keeps: a number in AZU_HOME and in each store, raised by a release that changes it.

A release reads what earlier ones wrote, and carries it over where that takes more than reading. What has no
number is of format 1.
"""

from pathlib import Path

from azu.config.settings import USERS_LINK
from azu.errors import ConfigurationError
from azu.files import read_json, write_private
from azu.redis_client import connect_redis_sync, typed_redis_errors

FORMAT = 1
_FILE = "format.json"
_KEY = "azu:format"


def check_format(number: object, where: str) -> None:
    """Raise ConfigurationError unless this release can read what is there."""
    if type(number) is not int or number < 1:
        raise ConfigurationError(f"{where} names no format")
    if number > FORMAT:
        raise ConfigurationError(
            f"{where} is of a later release of azu (format {number}; this one reads up to {FORMAT}): "
            "install that release"
        )


def check_home(home: Path) -> None:
    """Raise ConfigurationError where a later release wrote the home folder; nothing is written."""
    path = home / _FILE
    if path.exists():
        check_format(read_json(path), str(path))


def mark_home(home: Path) -> None:
    """Note that this release writes the home folder."""
    write_private(home / _FILE, f"{FORMAT}\n")


def mark_lender(home: Path) -> None:
    """Note that this release writes a home folder in which a machine lends.

    A network's is left alone: it carries over itself what it kept there.
    """
    if not any((home / name).exists() for name in (_FILE, "redis", USERS_LINK)):
        mark_home(home)


def claim_store(url: str) -> None:
    """Note in a store of azu's, such as "redis://...", that this release writes it.

    Raises ConfigurationError where a later one did, before anything is written, and Unavailable.
    """
    with connect_redis_sync(url) as client, typed_redis_errors():
        found = client.get(_KEY)
        if found is not None:
            check_format(int(found) if str(found).isdecimal() else found, f"{_KEY} in the store")
        client.set(_KEY, FORMAT)
