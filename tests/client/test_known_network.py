"""A network is used only if it is the one whose id the caller knows."""

from dataclasses import asdict, replace

import pytest
from eth_account import Account

from azu.auth.certificates import Authority, utc_now
from azu.auth.network_id import Succession, network_id
from azu.auth.succession import sign_succession
from azu.client.http import trusting_only
from azu.client.known_network import known_network, split_id
from azu.errors import InvalidRequest, Unauthenticated
from tests.client.ingress import Ingress, Reply, running_ingress

PLATFORM = "0x" + "9a" * 20


@pytest.fixture
def ingress():
    with running_ingress() as running:
        yield running


def shown(ingress: Ingress, platform: str, authority: str | None = None, claimed: str = "") -> None:
    body = {"address": platform, "chain_url": "", "network_id": claimed, "authority": authority}
    ingress.replies["GET /v1/platform"] = Reply(body)


def test_the_network_with_the_expected_id_is_known(ingress: Ingress) -> None:
    authority = Authority.new("azu ingress", utc_now()).pem.decode()
    shown(ingress, PLATFORM.upper().replace("0X", "0x"), authority)

    found = known_network(ingress.url, network_id(PLATFORM, authority))

    assert (found.platform, found.authority) == (PLATFORM, authority)
    assert found.trust() is not None


@pytest.mark.parametrize("platform", ["0x" + "66" * 20, ""])
def test_another_platform_is_refused_whatever_id_it_claims(ingress: Ingress, platform: str) -> None:
    expected = network_id(PLATFORM, None)
    shown(ingress, platform, claimed=expected)

    with pytest.raises(Unauthenticated, match="do not use it"):
        known_network(ingress.url, expected)


def test_another_authority_is_refused(ingress: Ingress) -> None:
    mine, other = (Authority.new("azu ingress", utc_now()).pem.decode() for _ in range(2))
    for authority in (other, None, other + mine, "hello"):
        shown(ingress, PLATFORM, authority)
        with pytest.raises(Unauthenticated):
            known_network(ingress.url, network_id(PLATFORM, mine))


def test_without_an_id_the_network_is_believed_and_its_id_computed(ingress: Ingress) -> None:
    shown(ingress, PLATFORM, claimed="f" * 32)

    found = known_network(ingress.url)

    assert found.network_id == network_id(PLATFORM, None)
    assert found.trust() is None


OLD, NEW = (Account.from_key(f"0x{number:064x}") for number in (1, 2))


def replaced(ingress: Ingress, succession: Succession, authority: str | None = None) -> None:
    """Have the network show a new platform, and how it came to be that."""
    body = {
        "address": NEW.address,
        "chain_url": "",
        "authority": authority,
        "successions": [asdict(succession)],
    }
    ingress.replies["GET /v1/platform"] = Reply(body)


def test_a_platform_that_the_old_key_has_replaced_is_known_by_the_old_id(ingress: Ingress) -> None:
    replaced(ingress, sign_succession(OLD, NEW))

    found = known_network(ingress.url, network_id(OLD.address, None))

    assert (found.platform, found.former) == (NEW.address.lower(), (OLD.address.lower(),))
    assert (found.is_changed, found.network_id) == (True, network_id(NEW.address, None))
    assert not known_network(ingress.url, found.network_id).is_changed


def test_a_change_that_the_old_key_has_not_signed_is_refused(ingress: Ingress) -> None:
    honest, mine = sign_succession(OLD, NEW), Authority.new("azu ingress", utc_now()).pem.decode()
    expected = network_id(OLD.address, None)
    for forged in (replace(honest, by_old=honest.by_new), replace(honest, by_new=honest.by_old)):
        replaced(ingress, forged)
        with pytest.raises(Unauthenticated, match="do not use it"):
            known_network(ingress.url, expected)
    # Nor does the signature admit another authority.
    replaced(ingress, honest, mine)
    with pytest.raises(Unauthenticated):
        known_network(ingress.url, expected)


def test_the_trusted_authority_is_one_certificate(ingress: Ingress) -> None:
    """Text behind the certificate, which the hash may not cover, adds no authority."""
    mine, other = (Authority.new("azu ingress", utc_now()).pem.decode() for _ in range(2))
    for text in (f"{mine}\n", mine + other):
        shown(ingress, PLATFORM, text)
        try:
            found = known_network(ingress.url, network_id(PLATFORM, mine))
        except Unauthenticated:
            continue
        assert found.authority == mine
        assert len(trusting_only(found.authority).get_ca_certs()) == 1


def test_an_address_is_split_into_url_and_id() -> None:
    assert split_id("https://azu.example:8000/#" + "AB" * 16) == ("https://azu.example:8000", "ab" * 16)
    assert split_id("http://127.0.0.1:8000") == ("http://127.0.0.1:8000", "")
    for wrong in ("#ab", "#" + "ab" * 17, "#" + "xy" * 16):
        with pytest.raises(InvalidRequest, match="32 hex digits"):
            split_id("https://azu.example" + wrong)
