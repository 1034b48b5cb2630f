"""The address of a client behind proxies."""

from ipaddress import ip_network

import pytest

from azu.auth.peers import client_address, network_of

PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "found"),
    [
        ("9.9.9.9", "", "9.9.9.9"),
        ("9.9.9.9", "6.6.6.6", "9.9.9.9"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "6.6.6.6", "6.6.6.6"),
        ("10.0.0.1", "5.5.5.5, 6.6.6.6", "6.6.6.6"),
        ("10.0.0.1", "5.5.5.5, 6.6.6.6,10.1.1.1", "6.6.6.6"),
        ("10.0.0.1", "10.0.0.2, 10.0.0.3", "10.0.0.2"),
        ("10.0.0.1", "6.6.6.6, who knows", "10.0.0.1"),
        ("10.0.0.1", "6.6.6.6, who knows, 10.2.2.2", "10.2.2.2"),
        ("::ffff:10.0.0.1", "6.6.6.6", "6.6.6.6"),
        ("fd00::1", "2001:db8::7", "2001:db8::7"),
        ("", "6.6.6.6", ""),
    ],
)
def test_only_the_last_address_that_a_trusted_proxy_names_counts(
    peer: str, forwarded: str, found: str
) -> None:
    assert client_address(peer, forwarded, PROXIES) == found


def test_without_trusted_proxies_no_header_counts() -> None:
    assert client_address("127.0.0.1", "6.6.6.6", ()) == "127.0.0.1"


def test_a_client_has_a_64_of_ipv6_and_one_address_of_ipv4() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:0:0:1") != network_of("2001:db8:0:1::1")
    assert [network_of(one) for one in ("10.0.0.1", "", "testclient")] == ["10.0.0.1", "", "testclient"]
