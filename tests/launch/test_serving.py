"""Users sign in at the address that the texts name which they sign."""

from pathlib import Path

import pytest

from azu.config import Settings, load_network
from azu.launch.redis_server import RedisUrls
from azu.launch.serving import control_config, login_url
from azu.launch.sidecars import ChainSettings
from azu.money.wire import Access

CHAIN = ChainSettings("http://127.0.0.1:1", "0x" + "a1" * 20, is_devnet=True, signer_key={})
TLS = {"tls_cert": Path("a.crt"), "tls_key": Path("a.key")}


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"http_host": "10.0.0.1", **TLS}, "https://10.0.0.1:8000"),
        ({"domain": "azu.example.org:8000"}, "http://azu.example.org:8000"),
        # What encrypts there is a proxy of the owner's own.
        ({"domain": "azu.example.org"}, "https://azu.example.org"),
        ({"domain": "azu.example.org", **TLS}, "https://azu.example.org"),
    ],
)
def test_the_login_names_the_domain_of_the_signed_text(
    tmp_path: Path, given: dict[str, object], url: str
) -> None:
    settings = Settings.model_construct(**Settings(home=tmp_path).model_dump() | given)
    books, redis = Access.new(1, ("scheduler",)), RedisUrls.same("redis://127.0.0.1:2/0")

    config = control_config(settings, load_network().policy, CHAIN, redis, books, 8000, "key")

    assert login_url(config) == url
