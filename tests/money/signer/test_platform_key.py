import json
import traceback
from pathlib import Path

import pytest
from eth_account import Account

from azu.errors import ConfigurationError
from azu.money.signer.platform_key import KEY, KEY_FILE, take_private_key
from azu.money.signer.policy import SigningRules
from azu.money.signer.process import SignerConfig
from azu.money.wire import Access
from tests.money.chain.test_actions import DEVNET

ACCOUNT = Account.create()
HEX = ACCOUNT.key.hex()
BYTES = json.dumps(list(ACCOUNT.key))


@pytest.mark.parametrize("text", [HEX, f"0x{HEX}", BYTES, f" {HEX}\n"])
def test_a_key_is_read_in_every_form_and_leaves_the_environment(text: str) -> None:
    environment = {KEY: text, "PATH": "/bin"}

    assert take_private_key(environment).address == ACCOUNT.address
    assert environment == {"PATH": "/bin"}


def test_a_key_is_read_from_a_file_that_only_its_owner_can_read(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(BYTES)
    file.chmod(0o600)

    assert take_private_key({KEY_FILE: str(file)}).address == ACCOUNT.address


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o777])
def test_a_key_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "key"
    file.write_text(HEX)
    file.chmod(mode)

    with pytest.raises(ConfigurationError, match="0600"):
        take_private_key({KEY_FILE: str(file)})


@pytest.mark.parametrize(
    "text", [HEX[:-1], HEX + "00", HEX[:-1] + "x", BYTES[:-1], "[1, 2, 999]", '["a"]', "", "0x", "00" * 32]
)
def test_a_bad_key_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        take_private_key({KEY: text})

    text = "".join(traceback.format_exception(caught.value))
    assert HEX[:16] not in text
    assert "999" not in text
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_no_key_and_two_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="needs"):
        take_private_key({})
    with pytest.raises(ConfigurationError, match="both"):
        take_private_key({KEY: HEX, KEY_FILE: str(tmp_path / "key")})


def test_the_configuration_does_not_show_its_secrets() -> None:
    config = SignerConfig(
        account=ACCOUNT,
        network=DEVNET,
        books_url="wire://signer:geheim@127.0.0.1:1",
        rules=SigningRules({}, frozenset(), (ACCOUNT.address.lower(),)),
        access=Access(1, {"treasury": "geheim"}),
        memory=Path("signer.json"),
    )

    for text in (repr(config), str(config), repr(config.account), str(config.account)):
        assert HEX not in text
        assert "geheim" not in text
