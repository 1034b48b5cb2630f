"""Receipts as JSON, signed by the platform's key: anybody can check them without asking the network."""

import json
from collections.abc import Mapping
from typing import Any

from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount
from pydantic import TypeAdapter

from azu.auth.signatures import signer_of_text
from azu.errors import InvalidRequest
from azu.protocol.job import Receipt

_RECEIPT = TypeAdapter(Receipt)
# Not part of what is signed.
_SEAL = ("signer", "signature")


def receipt_facts(receipt: Receipt) -> dict[str, Any]:
    """Return a receipt as JSON's values: what is signed."""
    facts: dict[str, Any] = _RECEIPT.dump_python(receipt, mode="json")
    return facts | {"token_layers": receipt.token_layers}


def sign_receipt(account: LocalAccount, receipt: Receipt) -> str:
    """Return the account's signature of a receipt, in hex."""
    # Through JSON: its names are strings, where ours may be numbers.
    facts = json.loads(json.dumps(receipt_facts(receipt)))
    signature: str = account.sign_message(encode_defunct(text=_text(facts))).signature.to_0x_hex()
    return signature


def sealed(receipt: Receipt, signer: str, signature: str | None) -> dict[str, Any]:
    """Return the receipt as it is handed out; without a signature it proves nothing."""
    return receipt_facts(receipt) | {"signer": signer, "signature": signature}


def verify_receipt(document: Mapping[str, Any]) -> str:
    """Return the address, in lower case, whose key signed a receipt of which nothing was changed since.

    Raises InvalidRequest for a receipt that is not signed or not signed by whom it says. Whether that is the
    platform is the caller's to know.
    """
    signer, signature = document.get("signer"), document.get("signature")
    if not isinstance(signer, str) or not isinstance(signature, str):
        raise InvalidRequest("this receipt is not signed", param="signature")
    facts = {name: value for name, value in document.items() if name not in _SEAL}
    found = signer_of_text(_text(facts), signature)
    if found is None or found != signer.lower():
        raise InvalidRequest(f"this receipt was changed, or not signed by {signer}", param="signature")
    return found


def _text(facts: Mapping[str, Any]) -> str:
    return f"azu receipt\n{json.dumps(facts, sort_keys=True, separators=(',', ':'))}"
