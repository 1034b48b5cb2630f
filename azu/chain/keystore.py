"""An encrypted key file as wallets write it (Web3 Secret Storage, version 3), checked before it is opened."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Hex = Annotated[str, Field(pattern=r"^(0x)?([0-9a-fA-F]{2})+$", max_length=512)]
# What deriving the key from the password may take: others use 2^18 rounds of 1 KiB, or some 260,000.
_MOST_SCRYPT_BYTES = 512 * 1024 * 1024
_MOST_PBKDF2_ROUNDS = 10_000_000


class _Part(BaseModel):
    # Others' files say more than is needed here.
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
    """What a key file must say; `address` has no 0x in files of most wallets."""

    address: Annotated[str, Field(pattern=r"^(0x)?[0-9a-fA-F]{40}$")]
    crypto: _Crypto
    version: Literal[3]

    def contents(self) -> dict[str, Any]:
        """Return what eth-account opens."""
        return self.model_dump(mode="json")
