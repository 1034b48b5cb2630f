"""The books' own key for receipts: it moves no money, and the platform's key certifies it once."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from eth_account import Account
from eth_account.signers.local import LocalAccount
from pydantic import ConfigDict, TypeAdapter, ValidationError

from azu.auth.signatures import ReceiptSignature, is_certified, sign_receipt
from azu.errors import ConfigurationError, InternalError
from azu.files import write_private
from azu.money.signer.calls import SignerCalls
from azu.protocol.job import Receipt

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kept:
    __pydantic_config__ = ConfigDict(extra="forbid", hide_input_in_errors=True)

    key: str
    certificate: str = ""


_KEPT = TypeAdapter(_Kept)


class ReceiptKey:
    """The key, in a file that only its owner can read; a missing file is made.

    Raises ConfigurationError for a damaged file.
    """

    def __init__(self, path: Path, platform: str) -> None:
        self._path = path
        self._platform = platform
        self._kept = _read(path)
        self._account: LocalAccount = Account.from_key(self._kept.key)
        # A file of another platform has a certificate that does not count.
        self._is_certified = is_certified(self.address, platform, self._kept.certificate)

    @property
    def address(self) -> str:
        """The address of the key."""
        address: str = self._account.address.lower()
        return address

    async def have_certified(self, signer: SignerCalls) -> None:
        """Have the platform certify the key, unless it has; raises Unavailable."""
        if self._is_certified:
            return
        certificate = await signer.certify(self.address)
        if not is_certified(self.address, self._platform, certificate):
            raise InternalError("the signer has another platform's key")
        self._kept = replace(self._kept, certificate=certificate)
        _write(self._path, self._kept)
        self._is_certified = True
        _LOG.info("the platform has certified %s, which signs receipts", self.address)

    def sign(self, receipt: Receipt) -> ReceiptSignature | None:
        """Return the signature of a receipt, None while the platform has not certified the key."""
        if not self._is_certified:
            return None
        return ReceiptSignature(self.address, self._kept.certificate, sign_receipt(self._account, receipt))


def _read(path: Path) -> _Kept:
    if not path.exists():
        _write(path, _Kept(Account.create().key.hex()))
    try:
        return _KEPT.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        # Without the cause: it would quote the key.
        raise ConfigurationError(
            f"{path} is damaged; remove it, and the platform certifies another"
        ) from None


def _write(path: Path, kept: _Kept) -> None:
    write_private(path, _KEPT.dump_json(kept).decode())
