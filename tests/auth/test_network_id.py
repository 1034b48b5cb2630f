"""A network's id changes with its platform's address and with its authority, and with nothing else."""

import pytest

from azu.auth.certificates import Authority, utc_now
from azu.auth.network_id import ID_DIGITS, network_id
from azu.errors import Unauthenticated

PLATFORM = "0x" + "9a" * 20


def test_platform_and_authority_make_the_id() -> None:
    one, two = (Authority.new("azu ingress", utc_now()).pem.decode() for _ in range(2))
    ids = {
        network_id(platform, authority)
        for platform in (PLATFORM, "0x" + "66" * 20)
        for authority in (None, one, two)
    }

    assert len(ids) == 6
    assert all(len(found) == ID_DIGITS for found in ids)


def test_how_they_are_written_does_not_matter() -> None:
    authority = Authority.new("azu ingress", utc_now()).pem.decode()

    assert network_id(PLATFORM.upper().replace("0X", "0x"), authority) == network_id(PLATFORM, authority)
    assert network_id(PLATFORM, f"{authority}\n") == network_id(PLATFORM, authority)


def test_what_is_no_certificate_has_no_id() -> None:
    with pytest.raises(Unauthenticated, match="no certificate"):
        network_id(PLATFORM, "hello")
