"""Reads the platform's private key, for the signer's process and `azu treasury rotate` alone."""

import json
import os
import stat
from collections.abc import MutableMapping
from pathlib import Path

from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.errors import ConfigurationError
from azu.money.treasury.environment import take_variable

KEY = "SCHEDULER_PRIVATE_KEY"
KEY_FILE = "AZU_PRIVATE_KEY_FILE"
_KEY_BYTES = 32


def take_private_key(environment: MutableMapping[str, str]) -> LocalAccount:
    """Return the account of the key in the environment or in the file it names, and remove both from it.

    The key is a JSON array of 32 bytes or 64 hex digits. Raises ConfigurationError, which never repeats the
    key, if there is none, more than one, or one in a file that others can read.
    """
    key, file = take_variable(environment, KEY), take_variable(environment, KEY_FILE)
    if key is not None and file is not None:
        raise ConfigurationError(f"set {KEY} or {KEY_FILE}, not both")
    if file is not None:
        return _account(_read(Path(file)), KEY_FILE)
    if key is None:
        raise ConfigurationError(f"the signer needs {KEY} or {KEY_FILE}")
    return _account(key, KEY)


def read_key_file(path: Path) -> LocalAccount:
    """Return the account of the key in a file; raises ConfigurationError as above."""
    return _account(_read(path), str(path))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigurationError(f"{path} can be read by others; make its mode 0600")
            return file.read(4096).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not a readable key file") from error


def _account(text: str, source: str) -> LocalAccount:
    # Without the cause, whose text could show the key or parts of it.
    try:
        key = _key_bytes(text.strip())
        account: LocalAccount = Account.from_key(key) if len(key) == _KEY_BYTES else None
    except Exception:
        account = None
    if account is None:
        raise ConfigurationError(f"{source} is not a private key: a JSON array of 32 bytes, or 64 hex digits")
    return account


def _key_bytes(text: str) -> bytes:
    if text.startswith("["):
        return bytes(json.loads(text))
    return bytes.fromhex(text.removeprefix("0x"))
