"""Everything that wallets, admins and the platform sign: claims, withdrawals, commands, receipts, texts."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from eth_account import Account
from eth_account.messages import SignableMessage, encode_defunct, encode_typed_data
from eth_account.signers.local import LocalAccount
from eth_keys.exceptions import BadSignature
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from azu.addresses import ADDRESS_PATTERN
from azu.errors import InvalidRequest
from azu.protocol.job import Receipt

MAX_WITHDRAWAL_LIFE_MS = 24 * 3_600_000
_SIGNATURE_BYTES = 65
_DISPUTE_FIELDS = (("jobId", "string"),)
_CLAIM_FIELDS = (("account", "address"),)
_WITHDRAWAL_FIELDS = (
    ("account", "address"),
    ("lamports", "uint256"),
    ("nonce", "uint256"),
    ("expiresAtMs", "uint256"),
)
# The EIP-712 type of each field that is neither a text nor an address.
_NUMBERS = ("lamports", "number", "nonce", "expires_at_ms")
_RECEIPT = TypeAdapter(Receipt)
# The fields of a receipt's document that are not part of what is signed, beside its `signer`.
_SIGNATURE = ("key", "certificate", "signature")


def signer_of_text(text: str, signature: str) -> str | None:
    """Return the address, in lower case, that signed a text as wallets do (EIP-191).

    `signature` is in hex. None if it is malformed; every other signature recovers to some address.
    """
    return _signer(encode_defunct(text=text), signature)


def signer_of_data(data: Mapping[str, Any], signature: str) -> str | None:
    """Return the address, in lower case, that signed typed data (EIP-712); None as above."""
    return _signer(encode_typed_data(full_message=dict(data)), signature)


def sign_claim(account: LocalAccount, platform: str) -> str:
    """Return the account's claim, in hex, to what it earns with the platform."""
    signed = account.sign_typed_data(full_message=_claim_data(account.address, platform))
    signature: str = signed.signature.to_0x_hex()
    return signature


def is_claim(address: str, platform: str, signature: str) -> bool:
    """Whether a lower-case address itself signed that it claims its earnings."""
    return signer_of_data(_claim_data(address, platform), signature) == address


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawal:
    """Send `lamports` from an address's account to that same address, before `expires_at_ms`.

    A nonce is used once; the address's owner chooses it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    address: str
    lamports: int
    nonce: int
    expires_at_ms: int

    @property
    def payout_id(self) -> str:
        """The id of the withdrawal's one payout."""
        return withdrawal_id(self.address, self.nonce)


def withdrawal_id(address: str, nonce: int) -> str:
    """Return the payout id of the one withdrawal that an address can make with a nonce."""
    return f"payout:{address}:withdrawal-{nonce}"


def sign_withdrawal(account: LocalAccount, withdrawal: Withdrawal, platform: str) -> str:
    """Return the account's signature, in hex, for the platform's network alone."""
    signed = account.sign_typed_data(full_message=_withdrawal_data(withdrawal, platform))
    signature: str = signed.signature.to_0x_hex()
    return signature


def is_signed(withdrawal: Withdrawal, platform: str, signature: str) -> bool:
    """Whether the address itself signed this withdrawal for this platform."""
    return signer_of_data(_withdrawal_data(withdrawal, platform), signature) == withdrawal.address


def sign_dispute(account: LocalAccount, job_id: str, platform: str) -> str:
    """Return the account's dispute of a job that it paid for, in hex."""
    signed = account.sign_typed_data(full_message=_dispute_data(job_id, platform))
    signature: str = signed.signature.to_0x_hex()
    return signature


def is_dispute(address: str, job_id: str, platform: str, signature: str) -> bool:
    """Whether a lower-case address itself signed that it disputes a job."""
    return signer_of_data(_dispute_data(job_id, platform), signature) == address


# What a command has to be before its signature is looked at: the EIP-712 types take no other values.
_Address = Annotated[str, Field(pattern=f"^{ADDRESS_PATTERN}$")]
_Number = Annotated[int, Field(ge=0, le=2**63)]
_Word = Annotated[str, Field(pattern=r"^[!-~]{1,200}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Command:
    """What all commands share: a nonce that is used once, and the end of the command."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    nonce: _Number
    expires_at_ms: _Number


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditSuspense(_Command):
    """Credit a row of the chain that is in suspense to an address."""

    row: _Word
    address: _Address
    kind: Literal["CreditSuspense"] = "CreditSuspense"


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeRevenue(_Command):
    """Send the platform's own money to an address."""

    address: _Address
    lamports: _Number
    kind: Literal["TakeRevenue"] = "TakeRevenue"

    @property
    def payout_id(self) -> str:
        """The id of the command's one payout."""
        return f"payout:revenue-{self.nonce}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverLoss(_Command):
    """Give the platform money from the account of an admin's own address: it pays for what is missing."""

    address: _Address
    lamports: _Number
    kind: Literal["CoverLoss"] = "CoverLoss"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmPayout(_Command):
    """End a payout that has left the account, and that the chain's ledgers do not show."""

    payout_id: _Word
    kind: Literal["ConfirmPayout"] = "ConfirmPayout"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseJob(_Command):
    """Give back to its payer what a job earned and that is not mature yet."""

    job_id: _Word
    kind: Literal["ReverseJob"] = "ReverseJob"


@dataclass(frozen=True, slots=True, kw_only=True)
class DismissDispute(_Command):
    """Give the shares of a disputed job to those who earned them."""

    job_id: _Word
    kind: Literal["DismissDispute"] = "DismissDispute"


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfHeld(_Command):
    node_id: _Word
    address: _Address
    lamports: _Number


@dataclass(frozen=True, slots=True, kw_only=True)
class PayHeld(_OfHeld):
    """Give what is held of a node's work to an address as its earnings."""

    kind: Literal["PayHeld"] = "PayHeld"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseHeld(_OfHeld):
    """Give what is held of a node's work back to a user."""

    kind: Literal["ReleaseHeld"] = "ReleaseHeld"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveNode(_Command):
    """Hold what a node's work is worth from now on; its id is never enrolled again."""

    node_id: _Word
    kind: Literal["RemoveNode"] = "RemoveNode"


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptLoss(_Command):
    """Go on with books that lost what came after entry `number`, which has this hash."""

    number: _Number
    hash: _Word
    kind: Literal["AcceptLoss"] = "AcceptLoss"


AdminCommand = (
    ReverseJob
    | DismissDispute
    | PayHeld
    | ReleaseHeld
    | RemoveNode
    | CreditSuspense
    | TakeRevenue
    | CoverLoss
    | ConfirmPayout
    | AcceptLoss
)


@dataclass(frozen=True, slots=True)
class _SignedCommand:
    __pydantic_config__ = ConfigDict(extra="forbid")

    command: Annotated[AdminCommand, Field(discriminator="kind")]
    signature: str


_COMMAND = TypeAdapter(_SignedCommand)
_COMMAND_FIELDS: TypeAdapter[AdminCommand] = TypeAdapter(AdminCommand)


def sign_command(account: LocalAccount, command: AdminCommand, platform: str) -> str:
    """Return an admin's command with its signature, as a text, for the platform's network alone."""
    signed = account.sign_typed_data(full_message=_command_data(command, platform))
    return _COMMAND.dump_json(_SignedCommand(command, signed.signature.to_0x_hex())).decode()


def command_of(text: str, platforms: Iterable[str], admins: Collection[str]) -> AdminCommand | None:
    """Return the command of a text that one of these lower-case addresses signed; None for any other.

    The caller has to check the command's end, and that its nonce was not used.
    """
    try:
        signed = _COMMAND.validate_json(text)
    except ValidationError:
        return None
    found = (
        signer_of_data(_command_data(signed.command, platform), signed.signature) for platform in platforms
    )
    return signed.command if any(signer in admins for signer in found) else None


@dataclass(frozen=True, slots=True)
class ReceiptSignature:
    """A receipt's signature by the key of the address `key`, and the platform's certificate of that key."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    key: str
    certificate: str
    signature: str


def sign_certificate(account: LocalAccount, key: str) -> str:
    """Return the platform's signature, in hex, that receipts are signed by the key of this address."""
    text = _certificate_text(account.address.lower(), key)
    signature: str = account.sign_message(encode_defunct(text=text)).signature.to_0x_hex()
    return signature


def is_certified(key: str, platform: str, certificate: str) -> bool:
    """Whether the platform itself signed that this key signs its receipts."""
    return signer_of_text(_certificate_text(platform, key), certificate) == platform


def receipt_facts(receipt: Receipt) -> dict[str, Any]:
    """Return a receipt as JSON values: what is signed."""
    facts: dict[str, Any] = _RECEIPT.dump_python(receipt, mode="json")
    return facts | {"token_layers": receipt.token_layers}


def sign_receipt(account: LocalAccount, receipt: Receipt) -> str:
    """Return the account's signature of a receipt, in hex."""
    # Through JSON, in which every key is a string; some keys here are numbers.
    facts = json.loads(json.dumps(receipt_facts(receipt)))
    signature: str = account.sign_message(encode_defunct(text=_receipt_text(facts))).signature.to_0x_hex()
    return signature


def sealed(receipt: Receipt, platform: str, signed: ReceiptSignature | None) -> dict[str, Any]:
    """Return the receipt with its platform (`signer`) and signature; without one it proves nothing."""
    parts = dict.fromkeys(_SIGNATURE) if signed is None else asdict(signed)
    return receipt_facts(receipt) | {"signer": platform} | parts


def verify_receipt(document: Mapping[str, Any]) -> str:
    """Return the platform's address, in lower case, of a receipt that was not changed since it was signed.

    The platform has certified the key that signed it. Raises InvalidRequest for a receipt without a
    signature, with one of another key, or with a key that its `signer` did not certify. The caller has to
    compare the address with the platform's.
    """
    platform = document.get("signer")
    key, certificate, signature = (document.get(name) for name in _SIGNATURE)
    if not (
        isinstance(platform, str)
        and isinstance(key, str)
        and isinstance(certificate, str)
        and isinstance(signature, str)
    ):
        raise InvalidRequest("this receipt is not signed", param="signature")
    facts = {name: value for name, value in document.items() if name not in ("signer", *_SIGNATURE)}
    if signer_of_text(_receipt_text(facts), signature) != key.lower():
        raise InvalidRequest(f"this receipt was changed, or not signed by {key}", param="signature")
    if not is_certified(key.lower(), platform.lower(), certificate):
        raise InvalidRequest(f"{platform} did not certify the key that signed this", param="certificate")
    return platform.lower()


def _signer(message: SignableMessage, signature: str) -> str | None:
    try:
        raw = bytes.fromhex(signature.removeprefix("0x"))
        if len(raw) != _SIGNATURE_BYTES:
            return None
        signer: str = Account.recover_message(message, signature=raw)
    except (ValueError, BadSignature):
        return None
    return signer.lower()


def _claim_data(address: str, platform: str) -> dict[str, Any]:
    return _typed_data("PayoutAddress", _CLAIM_FIELDS, {"account": address}, platform)


def _withdrawal_data(withdrawal: Withdrawal, platform: str) -> dict[str, Any]:
    message = {
        "account": withdrawal.address,
        "lamports": withdrawal.lamports,
        "nonce": withdrawal.nonce,
        "expiresAtMs": withdrawal.expires_at_ms,
    }
    return _typed_data("Withdrawal", _WITHDRAWAL_FIELDS, message, platform)


def _dispute_data(job_id: str, platform: str) -> dict[str, Any]:
    return _typed_data("DisputeJob", _DISPUTE_FIELDS, {"jobId": job_id}, platform)


def _command_data(command: AdminCommand, platform: str) -> dict[str, Any]:
    values = _COMMAND_FIELDS.dump_python(command)
    kind = values.pop("kind")
    fields = [(to_camel(name), _type_of(name)) for name in values]
    return _typed_data(kind, fields, {to_camel(name): value for name, value in values.items()}, platform)


def _type_of(field: str) -> str:
    return "uint256" if field in _NUMBERS else "address" if field == "address" else "string"


def _typed_data(
    primary_type: str, fields: Iterable[tuple[str, str]], message: dict[str, Any], platform: str
) -> dict[str, Any]:
    """Return EIP-712 typed data; the platform's address makes it valid for one network alone."""
    return {
        "primaryType": primary_type,
        "domain": {"name": "azu", "version": "1", "verifyingContract": platform},
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
                {"name": "verifyingContract", "type": "address"},
            ],
            primary_type: [{"name": name, "type": kind} for name, kind in fields],
        },
        "message": message,
    }


def _certificate_text(platform: str, key: str) -> str:
    return f"azu receipt key\nplatform: {platform}\nkey: {key}"


def _receipt_text(facts: Mapping[str, Any]) -> str:
    return f"azu receipt\n{json.dumps(facts, sort_keys=True, separators=(',', ':'))}"
