"""A user's wallet: an encrypted keystore file, and moving HYPE with it."""

import asyncio
import hashlib
import json
import secrets
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from eth_account import Account
from eth_account.signers.local import LocalAccount
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from azu.addresses import parse_address
from azu.clock import wall_clock_ms
from azu.errors import ChainError, ConfigurationError, DeadlineExceeded, InvalidRequest, plain_fault
from azu.files import read_json, write_private_once
from azu.money.chain.actions import sign_send_asset
from azu.money.chain.api import ChainClient
from azu.money.chain.networks import network_at
from azu.money.chain.port import Refusal, SignedAction

_T = TypeVar("_T")
# The most that deriving the key from the password may cost: other wallets use 2^18 rounds of 1 KiB (scrypt),
# or some 260,000 rounds (PBKDF2).
_MOST_SCRYPT_BYTES = 512 * 1024 * 1024
_MOST_PBKDF2_ROUNDS = 10_000_000
_TIMEOUT_S = 30.0
_CLOCK_SLACK_MS = 60_000
_POLL_S = 0.2
_SETTLE_S = 2.0


def create(path: Path, password: str) -> LocalAccount:
    """Make a new key and store it encrypted; raises ConfigurationError if the file exists."""
    return import_key(path, secrets.token_bytes(32), password)


def import_key(path: Path, key: bytes, password: str) -> LocalAccount:
    """Store a private key of 32 bytes encrypted, in a file that only its owner can read.

    Raises InvalidRequest for a bad key or an empty password, ConfigurationError if the file exists.
    """
    if not password:
        raise InvalidRequest("a wallet needs a password", param="password")
    try:
        account: LocalAccount = Account.from_key(key)
    except Exception as error:
        raise InvalidRequest("this is not a private key", param="key") from error.with_traceback(None)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        write_private_once(path, json.dumps(_with_digest(account.encrypt(password))).encode())
    except FileExistsError as error:
        raise ConfigurationError(f"{path} exists; a wallet is never overwritten") from error
    return account


def load(path: Path, password: str) -> LocalAccount:
    """Open a wallet; raises ConfigurationError if its file is malformed or the password is wrong."""
    keystore = _read(path)
    try:
        return Account.from_key(Account.decrypt(keystore.contents(), password))
    except (ValueError, KeyError, TypeError) as error:
        # The format's own checksum needs the password; the files of other wallets have no other one.
        told = "is damaged, or the password is wrong" if keystore.sha256 is None else "has another password"
        raise ConfigurationError(f"{path} {told}") from error


def address_of(path: Path) -> str:
    """Return a wallet's address; raises ConfigurationError if its file is malformed."""
    return parse_address(f"0x{_read(path).address.removeprefix('0x')}")


def transfer_hype(account: LocalAccount, destination: str, lamports: int, *, chain_url: str) -> str:
    """Move HYPE and return the hash of the transfer; for callers without an event loop.

    Raises what `send_hype` raises.
    """
    return _on_chain(chain_url, lambda chain: send_hype(chain, account, destination, lamports))


def balance_of(address: str, *, chain_url: str) -> int:
    """Return the lamports that an address holds on the chain; for callers without an event loop.

    Raises ChainError where the chain does not answer.
    """
    return _on_chain(chain_url, lambda chain: chain.spot_balance(address))


def _on_chain(chain_url: str, call: Callable[[ChainClient], Awaitable[_T]]) -> _T:
    async def called() -> _T:
        chain = ChainClient(network_at(chain_url))
        try:
            return await call(chain)
        finally:
            await chain.close()

    return asyncio.run(called())


async def send_hype(
    chain: ChainClient,
    account: LocalAccount,
    destination: str,
    lamports: int,
    *,
    timeout_s: float = _TIMEOUT_S,
) -> str:
    """Sign a transfer of HYPE once, post it until the chain shows it, and return its hash.

    Raises InvalidRequest for a bad amount or address, ChainError if the chain refuses the transfer,
    DeadlineExceeded if after `timeout_s` it is still unknown whether the chain executed it.
    """
    if lamports <= 0:
        raise InvalidRequest("an amount is at least one lamport", param="amount")
    destination = parse_address(destination, param="destination")
    nonce = wall_clock_ms()
    action = sign_send_asset(account, chain.network, destination=destination, lamports=lamports, nonce=nonce)
    try:
        async with asyncio.timeout(timeout_s):
            refusal = await _post_until_answered(chain, action)
            final = refusal is not None and not refusal.nonce_used
            # A refusal may follow a success whose answer was lost: even then the ledger is read for a while.
            find_s = _SETTLE_S if final else timeout_s
            tx_hash = await _find(chain, account.address.lower(), destination, nonce, find_s)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"the chain has not shown the transfer with nonce {nonce} yet; check before you send again"
        ) from error
    if tx_hash is None:
        assert refusal is not None, "without a refusal the search goes on until the timeout"
        if refusal.no_account:
            raise ChainError(
                f"the chain does not know {account.address}: send HYPE to it first", code="transfer_refused"
            )
        raise ChainError(f"the chain refused the transfer: {refusal.reason}", code="transfer_refused")
    return tx_hash


async def _post_until_answered(chain: ChainClient, action: SignedAction) -> Refusal | None:
    while True:
        try:
            return await chain.post_action(action.body)
        except ChainError:
            await asyncio.sleep(_POLL_S)  # the same bytes again: the chain executes a nonce once


async def _find(chain: ChainClient, sender: str, destination: str, nonce: int, find_s: float) -> str | None:
    # In the recipient's ledger: the chain drops the ledger of a sender whose account is empty.
    deadline = time.monotonic() + find_s
    while time.monotonic() < deadline:
        async for page in chain.ledger_updates(destination, nonce - _CLOCK_SLACK_MS):
            for transfer in page:
                if (transfer.sender, transfer.nonce) == (sender, nonce):
                    return transfer.hash
        await asyncio.sleep(_POLL_S)
    return None


def _read(path: Path) -> "Keystore":
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigurationError(f"there is no wallet at {path}; `azu wallet new` makes one") from error
    if mode & 0o077:
        raise ConfigurationError(f"{path} can be read by others; make its mode 0600")
    try:
        found = Keystore.model_validate(read_json(path))
    except ValidationError as error:
        place, fault = plain_fault(error.errors())
        raise ConfigurationError(f"{path} is damaged: {place}: {fault}") from error
    if found.sha256 not in (None, found.digest()):
        raise ConfigurationError(f"{path} is damaged: put a copy of it in its place")
    return found


def _with_digest(contents: dict[str, Any]) -> dict[str, Any]:
    """Return a key file's content with the digest by which damage is told from a wrong password."""
    return contents | {"sha256": Keystore.model_validate(contents).digest()}


_Hex = Annotated[str, Field(pattern=r"^(0x)?([0-9a-fA-F]{2})+$", max_length=512)]


class _Part(BaseModel):
    # The files of other wallets hold more fields than azu needs.
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, hide_input_in_errors=True)


class _Scrypt(_Part):
    dklen: Literal[32]
    n: Annotated[int, Field(ge=2, le=2**24)]
    r: Annotated[int, Field(ge=1, le=64)]
    p: Annotated[int, Field(ge=1, le=16)]
    salt: _Hex

    @model_validator(mode="after")
    def _affordable(self) -> Self:
        if self.n & (self.n - 1) or 128 * self.n * self.r > _MOST_SCRYPT_BYTES:
            raise ValueError("n is no power of two, or takes too much memory")
        return self


class _Pbkdf2(_Part):
    dklen: Literal[32]
    c: Annotated[int, Field(ge=1, le=_MOST_PBKDF2_ROUNDS)]
    prf: Literal["hmac-sha256"]
    salt: _Hex


class _CipherParams(_Part):
    iv: _Hex


class _Crypto(_Part):
    cipher: Literal["aes-128-ctr"]
    cipherparams: _CipherParams
    ciphertext: _Hex
    kdf: Literal["scrypt", "pbkdf2"]
    kdfparams: _Scrypt | _Pbkdf2
    mac: _Hex


class Keystore(_Part):
    """What a key file must hold; `address` has no 0x in the files of most wallets."""

    address: Annotated[str, Field(pattern=r"^(0x)?[0-9a-fA-F]{40}$")]
    crypto: _Crypto
    version: Literal[3]
    # azu's own; other wallets write none, and ignore it.
    sha256: str | None = None

    def digest(self) -> str:
        """Return the SHA-256, in hex, of what opens the key."""
        return hashlib.sha256(self.crypto.model_dump_json().encode()).hexdigest()

    def contents(self) -> dict[str, Any]:
        """Return what eth-account opens."""
        return self.model_dump(mode="json")
