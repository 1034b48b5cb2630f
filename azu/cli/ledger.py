"""`azu ledger audit|repair`: check the books, and repair their file after a crash of the machine."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.text import Text

from azu.cli.output import AsJson, show, table
from azu.config import Settings
from azu.units import format_bytes, hype_from_lamports

if TYPE_CHECKING:
    from azu.money.books import Books
    from azu.money.ledger.audit import Audit
    from azu.money.ledger.durability import FileRepair


# While the chain disagrees: a deposit or payout may be on its way into the books.
_MORE_AUDITS = 4
_AUDIT_AGAIN_S = 2.0

ledger = typer.Typer(no_args_is_help=True, help="The books: check them, repair their file.")


@ledger.command()
def audit(
    wallet_lamports: Annotated[
        int | None, typer.Option(help="What the platform's wallet holds, instead of asking the chain.")
    ] = None,
    since: Annotated[
        int, typer.Option(help="Begin at the seal that ends with this entry, instead of at the first.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Rebuild the books from their journal and compare; exit 0 only if everything agrees.

    The books are those of the network that runs in AZU_HOME. The chain is that of
    HYPERLIQUID_RPC_URL and HYPERLIQUID_ADDRESS, or that network's devnet; without one it is not asked.
    """
    report = asyncio.run(_audit(Settings.from_environment(), wallet_lamports, since))
    show(report, as_json, _drawn_audit)
    if not report.agrees:
        raise typer.Exit(1)


@ledger.command()
def repair(
    file: Annotated[
        Path | None, typer.Argument(help="The append-only file; without it that of AZU_HOME's Redis.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Cut a torn tail back to the last whole transfer and print what was dropped; Redis must be stopped."""
    from azu.money.ledger.durability import APPEND_ONLY_FILE
    from azu.money.ledger.durability import repair as cut_tail

    path = file or Settings.from_environment().money_home / "redis" / APPEND_ONLY_FILE
    show(cut_tail(path), as_json, _drawn_repair)


async def _audit(settings: Settings, wallet_lamports: int | None, since: int) -> "Audit":
    from azu.launch.sidecars import owners_books

    books = owners_books(settings.money_home)
    chain = None if wallet_lamports is not None else _chain(settings)
    try:
        report = await _audit_once(books, chain, wallet_lamports, since)
        for _ in range(_MORE_AUDITS):
            if report.agrees or chain is None:
                break
            await asyncio.sleep(_AUDIT_AGAIN_S)
            report = await _audit_once(books, chain, wallet_lamports, since)
        return report
    finally:
        await books.close()


async def _audit_once(
    books: "Books", chain: tuple[str, str] | None, wallet_lamports: int | None, since: int
) -> "Audit":
    if chain is not None:
        wallet_lamports = await _wallet(*chain)
    return await books.audit(wallet_lamports, since)


def _chain(settings: Settings) -> tuple[str, str] | None:
    """Return the chain's URL and the platform's address there, if they are known."""
    from azu.launch.sidecars import devnet_of

    if settings.chain_url is not None and settings.platform_address is not None:
        return settings.chain_url, settings.platform_address
    devnet = (
        devnet_of(settings.money_home) if settings.redis_url is None and settings.chain_url is None else None
    )
    return None if devnet is None else (devnet.url, devnet.platform_address)


async def _wallet(chain_url: str, platform_address: str) -> int:
    from azu.money.chain.api import ChainClient
    from azu.money.chain.networks import network_at

    chain = ChainClient(network_at(chain_url))
    try:
        return await chain.spot_balance(platform_address)
    finally:
        await chain.close()


def _drawn_audit(report: "Audit") -> Group:
    rows = [
        ("journal entries", report.entries),
        ("accounts", report.accounts),
        ("owed to users and workers", _hype(report.liabilities_lamports)),
        ("of that in transit", _hype(report.in_transit_lamports)),
        ("revenue", _hype(report.revenue_lamports)),
        ("wallet on the chain", _hype(report.wallet_lamports)),
        ("left the wallet, not booked yet", _hype(report.in_flight_lamports)),
    ]
    verdict = Text("Everything agrees.", "green")
    if not report.agrees:
        verdict = Text("\n".join(f"✗ {finding}" for finding in report.findings), "red")
    return Group(table(["", "HYPE"], rows, title="ledger"), verdict)


def _hype(lamports: int | None) -> str:
    return "not asked" if lamports is None else hype_from_lamports(lamports)


def _drawn_repair(done: "FileRepair") -> Text:
    if not done.dropped_bytes:
        return Text(f"{done.file} is whole: {format_bytes(done.kept_bytes)}, nothing dropped.", "green")
    transfers = ", ".join(done.dropped_transfers) or "none that can be read"
    return Text(
        f"{done.file} is cut back to its last whole transfer, {format_bytes(done.kept_bytes)}.\n"
        f"Dropped: {done.dropped_bytes} bytes, {done.dropped_commands} whole commands; transfers that have "
        f"not happened: {transfers}.\nThe bytes are in {done.saved_to}.",
        "yellow",
    )
