"""Any file is read or refused with a typed error: no file ends a command with a traceback."""

import base64
import json
import os
import random
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from eth_account import Account

from azu.auth.signatures import sealed
from azu.cli.receipt import _checked, _read
from azu.client.machine import Credential, store_credential, stored_credential
from azu.config import load_network
from azu.config.nodes_file import read_nodes
from azu.errors import AzuError, ConfigurationError
from azu.files import MAX_DOCUMENT_BYTES, read_json, read_yaml
from azu.launch.membership import EnrolmentTicket, Ticket, decode_ticket
from azu.launch.network_process import stop_network
from azu.money.chain import wallet
from azu.protocol.structure import Structure
from tests.builders import receipt, receipt_signed, structure
from tests.mutations import mutated_bytes, mutated_value

SEED = int(os.environ.get("AZU_TEST_SEED", "1"))
MUTANTS = int(os.environ.get("AZU_TEST_FILE_MUTANTS", "20"))
URL = "http://127.0.0.1:9"
MODEL = structure()
ENROLMENT = EnrolmentTicket(
    url="https://10.0.0.1:8000", network="0" * 32, secret="0" * 64, host="10.0.0.0/24"
)
PLATFORM = Account.from_key("0x" + "09" * 32)


def _read_ticket(path: Path) -> object:
    return decode_ticket(path.read_bytes().decode("latin-1"))


def _read_receipt(path: Path) -> object:
    return _checked(_read(path), PLATFORM.address)


def _write_keystore(path: Path) -> None:
    path.write_text(json.dumps(Account.encrypt("0x" + "07" * 32, "secret", kdf="pbkdf2", iterations=2)))


def _read_keystore(path: Path) -> object:
    path.chmod(0o600)
    return wallet.address_of(path), wallet.load(path, "secret")


def _write_credentials(path: Path) -> None:
    store_credential(path.parent, URL, Credential("azu-sk-x", "0x" + "a1" * 20, "0x" + "b1" * 20))


def _write_receipt(path: Path) -> None:
    path.write_text(
        json.dumps(sealed(receipt(), PLATFORM.address.lower(), receipt_signed(PLATFORM, receipt())))
    )


def _configuration(name: str) -> str:
    return (files("configs") / name).read_text()


# file name, how a valid file is written, how it is read
READERS: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object]]] = {
    "nodes": (
        "nodes.yaml",
        lambda path: path.write_text(_configuration("nodes.example.yaml")),
        lambda path: read_nodes(path, MODEL),
    ),
    "network": ("network.yaml", lambda path: path.write_text(_configuration("demo.yaml")), load_network),
    "policy": ("network.yaml", lambda path: path.write_text(_configuration("network.yaml")), load_network),
    "ticket": (
        "ticket",
        lambda path: path.write_text(Ticket(port=6379, token="0" * 64, network="0" * 32).encode()),
        _read_ticket,
    ),
    "enrolment": ("ticket", lambda path: path.write_text(ENROLMENT.encode()), _read_ticket),
    "receipt": ("receipt.json", _write_receipt, _read_receipt),
    "keystore": ("wallet.json", _write_keystore, _read_keystore),
    "credentials": ("credentials.json", _write_credentials, lambda path: stored_credential(path.parent, URL)),
    "running": (
        "network.json",
        lambda path: path.write_text(json.dumps({"pid": 2**30, "created_s": 1.5})),
        lambda path: stop_network(path.parent, 0.1),
    ),
    "structure": (
        "structure.json",
        lambda path: path.write_bytes(MODEL.to_json()),
        lambda path: Structure.from_json(path.read_bytes(), where=str(path)),
    ),
}


def mutants(name: str, good: bytes, chance: random.Random) -> list[bytes]:
    """Return mutants of a file: half of them change its text, half its values."""
    found = [mutated_bytes(good, chance) for _ in range(MUTANTS // 2)]
    for _ in range(MUTANTS // 2):
        if name == "ticket":
            said = json.loads(base64.urlsafe_b64decode(good + b"=="))
            changed = json.dumps(mutated_value(said, chance)).encode()
            found.append(base64.urlsafe_b64encode(changed).rstrip(b"="))
        else:
            said = yaml.safe_load(good)
            found.append(json.dumps(mutated_value(said, chance)).encode())
    return found


@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_refused_with_a_typed_error_or_reads_the_same(tmp_path: Path, kind: str) -> None:
    name, write, read = READERS[kind]
    path = tmp_path / name
    write(path)
    good = path.read_bytes()
    refused = []

    for content in mutants(kind, good, random.Random(f"{SEED} {kind}")):
        path.write_bytes(content)
        try:
            read(path)
        except AzuError as error:
            refused.append(error)

    assert len(refused) > MUTANTS // 3, "most of what stands in a file matters"
    for error in refused:
        assert 400 <= error.status < 500, error
        assert len(error.message) < 4096
        assert "azu-sk-x" not in error.message


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_a_file_is_read_only_up_to_a_limit(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(64 * MAX_DOCUMENT_BYTES)

    with pytest.raises(ConfigurationError, match="large is larger"):
        read(path)


@pytest.mark.parametrize(
    "kdf", [{"n": 2**30}, {"n": 2**18, "r": 64}, {"n": 1000}, {"p": 10**6}, {"dklen": 2**31}]
)
def test_a_wallet_that_would_take_all_memory_to_open_is_refused(tmp_path: Path, kdf: dict[str, int]) -> None:
    path = tmp_path / "wallet.json"
    keystore = Account.encrypt("0x" + "07" * 32, "secret", iterations=2)
    keystore["crypto"]["kdfparams"] |= kdf
    path.write_text(json.dumps(keystore))
    path.chmod(0o600)

    with pytest.raises(ConfigurationError, match=r"wallet\.json is damaged"):
        wallet.load(path, "secret")
