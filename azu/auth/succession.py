"""Which key of the platform replaced which: both sign it, so that neither alone can say so."""

from collections.abc import Iterable
from pathlib import Path

from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount
from pydantic import TypeAdapter, ValidationError

from azu.auth.network_id import Succession
from azu.auth.signatures import signer_of_text
from azu.errors import ConfigurationError
from azu.files import write_private

_SUCCESSIONS = TypeAdapter(tuple[Succession, ...])


def is_signed_by_both(one: Succession) -> bool:
    """Whether both keys have signed a succession."""
    text = _text(one.old, one.new)
    return (signer_of_text(text, one.by_old), signer_of_text(text, one.by_new)) == (one.old, one.new)


def sign_succession(old: LocalAccount, new: LocalAccount) -> Succession:
    """Have both keys sign that the second replaces the first."""
    addresses = old.address.lower(), new.address.lower()
    message = encode_defunct(text=_text(*addresses))
    return Succession(*addresses, *(one.sign_message(message).signature.to_0x_hex() for one in (old, new)))


def platforms_of(platform: str, successions: Iterable[Succession]) -> tuple[str, ...]:
    """Return a platform's address, then those that it had before, the last one first."""
    known, found = [one for one in successions if is_signed_by_both(one)], [platform]
    while before := [one.old for one in known if one.new == found[-1] and one.old not in found]:
        found.append(before[0])
    return tuple(found)


def successor_of(platform: str, successions: Iterable[Succession]) -> str | None:
    """Return the address that replaced a platform's, None if none did."""
    return next((one.new for one in successions if one.old == platform and is_signed_by_both(one)), None)


def read_successions(path: Path) -> tuple[Succession, ...]:
    """Return what a file has, nothing without a file; raises ConfigurationError for a damaged one."""
    try:
        return _SUCCESSIONS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return ()
    except (OSError, ValidationError) as error:
        raise ConfigurationError(f"{path} cannot be read, or is damaged: take it from a backup") from error


def keep_succession(path: Path, one: Succession) -> None:
    """Add a succession to a file, once."""
    known = read_successions(path)
    if one not in known:
        write_private(path, _SUCCESSIONS.dump_json((*known, one)).decode())


def _text(old: str, new: str) -> str:
    return f"azu platform\nold: {old}\nnew: {new}"
