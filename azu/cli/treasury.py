"""`azu treasury`: the process that holds the platform's key, and what its admin has to decide."""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.text import Text

from azu.cli.admin_command import carry_out, with_books
from azu.cli.output import AsJson, show, table
from azu.config import Settings
from azu.units import hype_from_lamports

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount
    from rich.console import RenderableType

    from azu.money.books import Books, Uncredited


# Creating an account on the chain costs the platform a dollar, so its first payout has to be larger.
_NEW_ACCOUNT_FACTOR = 4
_DEVNET_POLL_S = 0.2
_MEMORY = "treasury.json"


@dataclass(frozen=True, slots=True)
class UncreditedReport:
    """The transfers to the platform that were credited to no account, and their number."""

    count: int
    transfers: "tuple[Uncredited, ...]"


treasury = typer.Typer(help="Credit deposits, pay workers and users; the verbs are for the admin.")


@treasury.callback(invoke_without_command=True)
def process(context: typer.Context) -> None:
    """Run the treasury unless a verb is given."""
    if context.invoked_subcommand is None:
        run_treasury()


@treasury.command()
def status(as_json: AsJson = False) -> None:
    """Print what is on its way to users and workers, and whether the ledger went back.

    The books are those of the network that runs in AZU_HOME.
    """
    show(with_books(_status), as_json, _drawn_status)


@treasury.command("accept-loss")
def accept_loss(
    size: Annotated[int, typer.Argument(help="How far the ledger went back, as `status` prints it.")],
) -> None:
    """Have the treasury sign again although the ledger went back: first see what the chain shows as paid.

    A payout that the chain executed and the ledger lost is owed again in the books: once the loss is accepted
    it is paid a second time, at the platform's cost.
    """
    with_books(lambda books: books.accept_loss(size))


@treasury.command()
def uncredited(as_json: AsJson = False) -> None:
    """List the transfers to the platform that were credited to no account, the newest first.

    They came from HyperEVM, by multi-signature, or in another way that proves no single sender. The books are
    those of the network that runs in AZU_HOME.
    """
    transfers = with_books(lambda books: books.uncredited())
    show(UncreditedReport(len(transfers), transfers), as_json, _drawn_uncredited)


@treasury.command()
def credit(
    row: Annotated[str, typer.Argument(help="The row in suspense, as `azu ledger held` shows it.")],
    address: Annotated[str, typer.Argument(help="The address whose account gets it.")],
    as_json: AsJson = False,
) -> None:
    """Credit a row of the chain that is in suspense to the user that it belongs to."""
    from azu.addresses import parse_address
    from azu.auth.signatures import CreditSuspense
    from azu.errors import NotFound

    suspense = with_books(lambda books: books.held()).suspense
    found = next((one for one in suspense if one.row == row), None)
    if found is None:
        raise NotFound(f"no row {row} is in suspense", param="row", code="row_not_found")
    recipient = parse_address(address)
    moves = [(f"suspense, sent by {found.sender}", f"user {recipient}", found.lamports)]
    carry_out(CreditSuspense, moves, as_json, row=row, address=recipient)


def _drawn_uncredited(report: UncreditedReport) -> "RenderableType":
    rows = [
        (f"{datetime.fromtimestamp(one.time_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}", one.sender, one.amount,
         one.token_name, one.hash, one.reason)
        for one in report.transfers
    ]  # fmt: skip
    columns = ["time (UTC)", "sender", "amount", "token", "hash", "why"]
    return table(columns, rows, title=f"{report.count} transfers to the platform that were not credited")


async def _status(books: "Books") -> dict[str, int]:
    totals = await books.totals()
    held = totals.held_lamports
    return {
        "to_workers_lamports": held.get("worker_paying", 0),
        "to_users_lamports": held.get("user_withdrawing", 0),
        "lost_writes": totals.lost_writes,
    }


def _drawn_status(found: dict[str, int]) -> "RenderableType":
    rows = [
        ("on its way to workers", hype_from_lamports(found["to_workers_lamports"])),
        ("on its way to users", hype_from_lamports(found["to_users_lamports"])),
    ]
    lost = found["lost_writes"]
    verdict = Text("The ledger has all that it answered.", "green")
    if lost:
        verdict = Text(
            f"The ledger went back by {lost}: nothing is signed until `azu treasury accept-loss {lost}`.",
            "red",
        )
    return Group(table(["", "HYPE"], rows, title="treasury"), verdict)


def run_treasury() -> None:
    """Credit deposits and pay workers until stopped; the only process that reads the platform's private key.

    The key comes from SCHEDULER_PRIVATE_KEY or the file that AZU_PRIVATE_KEY_FILE names, the chain from
    HYPERLIQUID_RPC_URL, its own state from REDIS_HOST, REDIS_PORT and REDIS_PASSWORD. `azu up` sets
    AZU_BOOKS_URL, the books, and AZU_JOBS_REDIS_URL, the Redis of the jobs; without that both Redis are one.
    """
    import os
    from dataclasses import replace

    from azu.config import load_network
    from azu.errors import ConfigurationError
    from azu.launch.processes import end_with_parent
    from azu.launch.sidecars import BOOKS_URL, JOBS_URL
    from azu.logs import start_logging
    from azu.money.chain.networks import network_at
    from azu.money.treasury.environment import take_variable
    from azu.money.treasury.payouts import Threshold
    from azu.money.treasury.platform_key import take_private_key
    from azu.money.treasury.process import TreasuryConfig, run

    end_with_parent()
    account = take_private_key(os.environ)
    books_url, jobs_url = (take_variable(os.environ, name) for name in (BOOKS_URL, JOBS_URL))
    settings = Settings.from_environment()
    if settings.chain_url is None or settings.redis_url is None or not books_url:
        raise ConfigurationError("the treasury needs HYPERLIQUID_RPC_URL, REDIS_HOST and AZU_BOOKS_URL")
    if settings.platform_address not in (None, account.address.lower()):
        raise ConfigurationError("HYPERLIQUID_ADDRESS is not the address of the treasury's key")
    threshold = load_network(settings.network).policy.payout_threshold_lamports
    config = TreasuryConfig(
        redis_url=settings.redis_url,
        books_url=books_url,
        network=network_at(settings.chain_url),
        account=account,
        threshold=Threshold(threshold, _NEW_ACCOUNT_FACTOR * threshold),
        memory=settings.home / _MEMORY,
        jobs_redis_url=jobs_url,
    )
    if config.network.name == "devnet":
        # The official networks count requests; a local chain does not.
        config = replace(config, poll_s=_DEVNET_POLL_S, plan_every_s=1.0)
    start_logging("treasury", hidden=_secrets(account, settings))
    asyncio.run(run(config, ready=lambda: print("treasury ready", flush=True)))  # noqa: T201


def _secrets(account: "LocalAccount", settings: "Settings") -> "list[str]":
    """Return the secrets of this process that no log line may contain."""
    password = settings.redis_password
    return [account.key.hex(), *([password.get_secret_value()] if password else [])]
