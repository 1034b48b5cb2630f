"""Signed actions, made and checked with the Hyperliquid SDK; the only file that imports it.

The SDK's own transfer calls take floats and use a new nonce at every call, so that a retry pays twice. Here
an action is built from whole lamports and signed once; every retry sends the same bytes.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from eth_account.signers.local import LocalAccount
from hyperliquid.utils import signing

from azu.errors import InvalidRequest
from azu.money.chain.networks import ChainNetwork
from azu.money.chain.port import SignedAction
from azu.units import hype_from_lamports

# The EIP-712 fields and primary type that are signed for each action; a noop is signed by its hash.
_SIGNED_FIELDS = {
    "sendAsset": (signing.SEND_ASSET_SIGN_TYPES, "SendAsset"),
    "spotSend": (signing.SPOT_TRANSFER_SIGN_TYPES, "SpotSend"),
    "userSetAbstraction": (signing.USER_SET_ABSTRACTION_SIGN_TYPES, "UserSetAbstraction"),
}


def sign_send_asset(
    account: LocalAccount, network: ChainNetwork, *, destination: str, lamports: int, nonce: int
) -> SignedAction:
    """Sign a transfer of HYPE from the account's spot balance to another's."""
    action = {
        "type": "sendAsset",
        # A checksummed and a lower-case destination sign differently; the chain wants lower case.
        "destination": destination.lower(),
        "sourceDex": "spot",
        "destinationDex": "spot",
        "token": network.hype,
        "amount": hype_from_lamports(lamports),
        "fromSubAccount": "",
        "nonce": nonce,
    }
    signature = signing.sign_send_asset_action(account, action, network.is_mainnet)
    return _signed(action, nonce, signature)


def sign_noop(account: LocalAccount, network: ChainNetwork, *, nonce: int) -> SignedAction:
    """Sign an action that does nothing but use up a nonce."""
    action = {"type": "noop"}
    signature = signing.sign_l1_action(account, action, None, nonce, None, network.is_mainnet)
    return _signed(action, nonce, signature)


def recover_signer(request: Mapping[str, Any], *, is_mainnet: bool) -> str:
    """Return the address, in lower case, whose key signed the body of a POST /exchange.

    Any well-formed signature recovers to some address; only the signer's has an account.
    Raises InvalidRequest when the action or the signature is malformed.
    """
    action = deepcopy(request["action"])  # the SDK writes into it
    try:
        if action["type"] == "noop":
            address = signing.recover_agent_or_user_from_l1_action(
                action,
                request["signature"],
                request.get("vaultAddress"),
                request["nonce"],
                request.get("expiresAfter"),
                is_mainnet,
            )
        else:
            fields, primary_type = _SIGNED_FIELDS[action["type"]]
            address = signing.recover_user_from_user_signed_action(
                action, request["signature"], fields, f"HyperliquidTransaction:{primary_type}", is_mainnet
            )
    except Exception as error:  # every layer below raises its own kind of error
        raise InvalidRequest("the action or its signature is malformed") from error
    return str(address).lower()


def _signed(action: dict[str, Any], nonce: int, signature: dict[str, Any]) -> SignedAction:
    request = {
        "action": action,
        "nonce": nonce,
        "signature": {"r": _padded(signature["r"]), "s": _padded(signature["s"]), "v": signature["v"]},
        "vaultAddress": None,
        "expiresAfter": None,
    }
    return SignedAction(nonce, json.dumps(request, separators=(",", ":")).encode())


def _padded(number: str) -> str:
    # The SDK drops leading zeros.
    return f"0x{int(number, 16):064x}"
