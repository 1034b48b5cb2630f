"""Addresses and hashes are in lower case, or refused."""

import pytest

from azu.addresses import parse_address, parse_hash
from azu.errors import InvalidRequest

ADDRESS, HASH = "0x0D1d9635D0640821d15e323ac8AdADfA9c111414", "0x" + "Ab" * 32


def test_addresses_and_hashes_become_lower_case() -> None:
    assert parse_address(ADDRESS) == ADDRESS.lower()
    assert parse_hash(HASH.upper().replace("0X", "0x")) == HASH.lower()


@pytest.mark.parametrize(
    "text", ["", ADDRESS[:-1], ADDRESS + "0", ADDRESS[2:], f" {ADDRESS}", ADDRESS + "\n", "0x" + "g" * 40]
)
def test_a_malformed_address_is_refused_with_the_parameters_name(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_address(text, param="user_address")

    assert caught.value.param == "user_address"


@pytest.mark.parametrize("text", ["", HASH[:-1], HASH + "0", HASH[2:], HASH + "\n"])
def test_a_malformed_hash_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_hash(text)
