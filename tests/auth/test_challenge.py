"""The text to sign is an EIP-4361 message for exactly one address, domain and time."""

import pytest

from azu.auth.challenge import challenge_text, checked_address
from azu.errors import InvalidRequest

ADDRESS = "0xfb6916095ca1df60bb79ce92ce3ea74c37c5d359"
CHECKSUMMED = "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359"


def test_the_text_is_an_eip_4361_message() -> None:
    assert challenge_text(ADDRESS, "127.0.0.1:8000", "0123456789abcdef", 1_700_000_000_123) == (
        "127.0.0.1:8000 wants you to sign in with your Ethereum account:\n"
        f"{CHECKSUMMED}\n"
        "\n"
        "Open an azu API key. It can spend this address's balance at azu; it cannot withdraw it.\n"
        "\n"
        "URI: https://127.0.0.1:8000\n"
        "Version: 1\n"
        "Chain ID: 1\n"
        "Nonce: 0123456789abcdef\n"
        "Issued At: 2023-11-14T22:13:20.123Z\n"
        "Expiration Time: 2023-11-14T22:18:20.123Z"
    )


@pytest.mark.parametrize("address", [ADDRESS, CHECKSUMMED, "0x" + ADDRESS[2:].upper()])
def test_an_address_is_kept_in_lower_case(address: str) -> None:
    assert checked_address(address) == ADDRESS


@pytest.mark.parametrize(
    "address",
    [
        "",
        "0x",
        ADDRESS[2:],
        ADDRESS[:-1],
        ADDRESS + "0",
        ADDRESS[:-1] + "g",
        CHECKSUMMED.replace("fB", "Fb"),  # mixed case with a wrong checksum: a typing error
        f"{ADDRESS}\n",
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        checked_address(address)
    assert refused.value.param == "address"
