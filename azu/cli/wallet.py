"""`azu wallet new|import|show|balance|fund`: the user's key on this machine."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from azu.cli.output import AsJson, Exact, amount, show, unit
from azu.config import Settings

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount


PASSWORD = "AZU_WALLET_PASSWORD"  # noqa: S105 (its name)

KeyFile = Annotated[
    Path | None, typer.Option("--key-file", help="A file with the key in hex; without it you are asked.")
]

wallet = typer.Typer(no_args_is_help=True)


@wallet.command()
def new(as_json: AsJson = False) -> None:
    """Make a wallet on this machine, encrypted with a password."""
    from azu.money.chain import wallet as keystore

    path = _path(Settings.from_environment().home)
    account = keystore.create(path, _password(confirm=True))
    _show(account.address, path, as_json)


@wallet.command("import")
def import_(key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """Store a private key you have on this machine, encrypted with a password."""
    from azu.errors import InvalidRequest
    from azu.money.chain import wallet as keystore

    try:
        text = (
            key_file.read_text() if key_file else typer.prompt("Private key (hex)", hide_input=True, err=True)
        )
        key = bytes.fromhex(text.strip().removeprefix("0x"))
    except OSError as error:
        raise InvalidRequest(f"{key_file} cannot be read: {error.strerror}", param="key") from error
    except ValueError:
        raise InvalidRequest("this is not a private key in hex", param="key") from None
    path = _path(Settings.from_environment().home)
    _show(keystore.import_key(path, key, _password(confirm=True)).address, path, as_json)


@wallet.command("show")
def show_address(as_json: AsJson = False) -> None:
    """Show the wallet's address; needs no password."""
    from azu.money.chain import wallet as keystore

    path = _path(Settings.from_environment().home)
    _show(keystore.address_of(path), path, as_json)


@wallet.command()
def balance(exact: Exact = False, as_json: AsJson = False) -> None:
    """Show what the wallet holds on the network's chain; `azu deposit` moves it to the network."""
    from azu.client import Client
    from azu.money.chain import wallet as keystore

    address = keystore.address_of(_path(Settings.from_environment().home))
    chain_url = Client().platform().chain_url
    lamports = keystore.balance_of(address, chain_url=chain_url)
    facts = {"address": address, "lamports": lamports, "chain_url": chain_url}
    show(facts, as_json, lambda _: f"{address} holds {amount(lamports, exact)} {unit(exact)} on {chain_url}")


@wallet.command()
def fund(
    hype: Annotated[str, typer.Argument(metavar="AMOUNT", help="HYPE, for example 10")] = "10",
    as_json: AsJson = False,
) -> None:
    """Get play money from the faucet of the network's chain; only a devnet has one."""
    from azu.client import Client
    from azu.devnet import faucet
    from azu.money.chain import wallet as keystore
    from azu.units import hype_from_lamports, lamports_from_hype

    settings = Settings.from_environment()
    address, lamports = keystore.address_of(_path(settings.home)), lamports_from_hype(hype)
    tx_hash = faucet.fund(Client().platform().chain_url, address, lamports)
    facts = {"address": address, "lamports": lamports, "tx_hash": tx_hash}
    show(facts, as_json, lambda _: f"{address} got {hype_from_lamports(lamports)} HYPE of play money")


def unlock(home: Path) -> "LocalAccount":
    """Return this machine's wallet, decrypted with AZU_WALLET_PASSWORD or a typed password."""
    from azu.money.chain import wallet as keystore

    path = _path(home)
    keystore.address_of(path)  # a damaged file is reported before a password is asked for
    return keystore.load(path, _password(confirm=False))


def _path(home: Path) -> Path:
    return home / "wallet.json"


def _password(*, confirm: bool) -> str:
    given = os.environ.get(PASSWORD)
    if given is not None:
        return given
    typed: str = typer.prompt("Wallet password", hide_input=True, confirmation_prompt=confirm, err=True)
    return typed


def _show(address: str, path: Path, as_json: bool) -> None:
    facts = {"address": address.lower(), "file": str(path)}
    show(facts, as_json, lambda found: f"{found['address']}  ({found['file']})")
