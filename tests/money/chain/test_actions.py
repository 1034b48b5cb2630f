import json

import pytest
from eth_account import Account
from hyperliquid.utils import signing

from azu.errors import InvalidRequest
from azu.money.chain.actions import recover_signer, sign_noop, sign_send_asset
from azu.money.chain.networks import ChainNetwork, network_at

WALLET = Account.from_key("0x" + "0123456789" * 6 + "0123")
MAINNET = network_at("https://api.hyperliquid.xyz")
DEVNET = network_at("http://127.0.0.1:3001")
MIXED_CASE = "0x0D1d9635D0640821d15e323ac8AdADfA9c111414"


@pytest.mark.parametrize("network", [MAINNET, DEVNET])
def test_an_action_is_signed_as_the_sdk_signs_it(network: ChainNetwork) -> None:
    action = sign_send_asset(WALLET, network, destination=MIXED_CASE, lamports=1_000, nonce=1_790_000_000_001)

    body = json.loads(action.body)

    assert body["action"] == {
        "type": "sendAsset",
        "destination": MIXED_CASE.lower(),
        "sourceDex": "spot",
        "destinationDex": "spot",
        "token": network.hype,
        "amount": "0.00001",
        "fromSubAccount": "",
        "nonce": 1_790_000_000_001,
        "signatureChainId": "0x66eee",
        "hyperliquidChain": "Mainnet" if network.is_mainnet else "Testnet",
    }
    sdk = signing.sign_send_asset_action(WALLET, dict(body["action"]), network.is_mainnet)
    assert {key: int(str(sdk[key]), 0) for key in "rsv"} == {
        key: int(str(body["signature"][key]), 0) for key in "rsv"
    }
    assert (body["nonce"], body["vaultAddress"], body["expiresAfter"]) == (1_790_000_000_001, None, None)


def test_a_transfer_signed_twice_has_the_same_bytes() -> None:
    once, again = (
        sign_send_asset(WALLET, DEVNET, destination=MIXED_CASE, lamports=5, nonce=7) for _ in range(2)
    )

    assert once == again


def test_signatures_are_padded_to_32_bytes() -> None:
    # With this wallet the SDK's s is short at nonce 9 and its r at nonce 90.
    for nonce, part in ((9, "s"), (90, "r")):
        short = signing.sign_l1_action(WALLET, {"type": "noop"}, None, nonce, None, False)
        signature = json.loads(sign_noop(WALLET, DEVNET, nonce=nonce).body)["signature"]

        assert len(short[part]) < 66
        assert len(signature["r"]) == len(signature["s"]) == 66


@pytest.mark.parametrize("is_mainnet", [True, False])
def test_the_signer_is_recovered(is_mainnet: bool) -> None:
    network = MAINNET if is_mainnet else DEVNET
    for action in (
        sign_noop(WALLET, network, nonce=9),
        sign_send_asset(WALLET, network, destination=MIXED_CASE, lamports=5, nonce=9),
    ):
        request = json.loads(action.body)
        before = json.dumps(request)

        assert recover_signer(request, is_mainnet=is_mainnet) == WALLET.address.lower()
        assert json.dumps(request) == before, "recovering leaves the request alone"


def test_a_signature_published_by_another_client_is_recovered() -> None:
    action = {
        "type": "spotSend",
        "signatureChainId": "0xa4b1",
        "hyperliquidChain": "Mainnet",
        "destination": "0x2222222222222222222222222222222222222222",
        "token": "HYPE:0x00000000000000000000000000000096",
        "amount": "1.25",
        "time": 1_790_412_105_001,
    }
    signature = {
        "r": "0x827f978f3534efae70fed4a2516a69a7b96ea8f70b66d0f1e3d5a9b0aab79b81",
        "s": "0x190e955ce2485993005aa0cb898d337b585a38cf51ee79d7c491662d49773e6e",
        "v": 27,
    }

    signer = recover_signer(
        {"action": action, "signature": signature, "nonce": action["time"]}, is_mainnet=True
    )

    assert signer == WALLET.address.lower()


def test_an_action_changed_after_signing_has_another_signer() -> None:
    request = json.loads(sign_send_asset(WALLET, DEVNET, destination=MIXED_CASE, lamports=5, nonce=9).body)
    request["action"]["amount"] = "1000"

    assert recover_signer(request, is_mainnet=False) != WALLET.address.lower()


@pytest.mark.parametrize(
    "broken", [{"action": {"type": "bogus"}}, {"signature": {"r": "0x0", "s": "zzz", "v": 1}}]
)
def test_a_malformed_request_is_refused(broken: dict[str, object]) -> None:
    request = json.loads(sign_noop(WALLET, DEVNET, nonce=9).body) | broken

    with pytest.raises(InvalidRequest):
        recover_signer(request, is_mainnet=False)
