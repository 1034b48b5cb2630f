"""`azu treasury`: the process that credits and pays, and what its admin has to decide."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.text import Text

from azu.cli.admin_command import COMMAND_LIFE_MS, admin_wallet, carry_out, platform_of, with_books
from azu.cli.output import AsJson, show, table, utc
from azu.config import Settings
from azu.units import hype_from_lamports, lamports_from_hype

if TYPE_CHECKING:
    from rich.console import RenderableType

    from azu.money.books import Books, Uncredited
    from azu.money.signer.calls import RemoteSigner


# Creating an account on the chain costs the platform a dollar, so its first payout has to be larger.
_NEW_ACCOUNT_FACTOR = 4
_DEVNET_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class UncreditedReport:
    """The transfers to the platform that were credited to no account, and their number."""

    count: int
    transfers: "tuple[Uncredited, ...]"


@dataclass(frozen=True, slots=True)
class TreasuryReport:
    """What is on its way, and what the signer found; it is red once that stands."""

    to_workers_lamports: int
    to_users_lamports: int
    revenue_on_its_way_lamports: int
    lost_writes: int
    findings: tuple[str, ...]
    is_red: bool


treasury = typer.Typer()


@treasury.callback(invoke_without_command=True)
def process(context: typer.Context) -> None:
    """Run the treasury unless a verb is given."""
    if context.invoked_subcommand is None:
        run_treasury()


@treasury.command()
def status(as_json: AsJson = False) -> None:
    """Print what is on its way to users and workers, and why the signer signs nothing, if it does not.

    The books are those of the network that runs in AZU_HOME.
    """
    show(with_books(_status), as_json, _drawn_status)


@treasury.command("accept-loss")
def accept_loss(as_json: AsJson = False) -> None:
    """Have the signer go on with the books as they are: first see what the chain shows as paid.

    The wallet of an admin signs that. Nothing is signed for ten more minutes, in which no other process may
    send from the platform's account; then only while books and chain agree.
    """
    from azu.auth.signatures import AcceptLoss, sign_command
    from azu.clock import wall_clock_ms
    from azu.errors import Conflict

    settings = Settings.from_environment()
    wallet, platform = admin_wallet(settings), platform_of(settings)

    async def accept(books: "Books") -> dict[str, int]:
        async with _signer() as signer:
            lost, findings = (await books.totals()).lost_writes, (await signer.status()).findings
            if not lost and not findings:
                raise Conflict("books and chain agree: there is nothing to accept")
            head, now_ms = await books.head(), wall_clock_ms()
            # The signer takes a later command only.
            command = AcceptLoss(
                number=head.number, hash=head.hash, nonce=now_ms, expires_at_ms=now_ms + COMMAND_LIFE_MS
            )
            text = sign_command(wallet, command, platform)
            if lost:
                await books.command(text)
            await signer.accept(text)
        return {"entry": head.number, "lost_writes": lost}

    found = with_books(accept)
    show(found, as_json, lambda facts: f"accepted the books as they are at entry {facts['entry']}")


@treasury.command("cover-loss")
def cover_loss(
    amount: Annotated[str, typer.Argument(help="HYPE, for example 0.5")], as_json: AsJson = False
) -> None:
    """Pay for what is missing, from what the admin's wallet has deposited and has available."""
    from azu.auth.signatures import CoverLoss

    address = admin_wallet(Settings.from_environment()).address.lower()
    lamports = lamports_from_hype(amount)
    moves = [(f"user {address}", "the platform", lamports)]
    carry_out(CoverLoss, moves, as_json, address=address, lamports=lamports)


@treasury.command("take-revenue")
def take_revenue(
    address: Annotated[str, typer.Argument(help="Where the platform's own money is sent.")],
    amount: Annotated[str, typer.Argument(help="HYPE, for example 0.5")],
    as_json: AsJson = False,
) -> None:
    """Send what the platform earned to an address.

    The treasury sends it like a payout; `status` shows it until the chain has it.
    """
    from azu.addresses import parse_address
    from azu.auth.signatures import TakeRevenue

    recipient, lamports = parse_address(address), lamports_from_hype(amount)
    moves = [("the platform's revenue", f"the chain's address {recipient}", lamports)]
    carry_out(TakeRevenue, moves, as_json, address=recipient, lamports=lamports)


@treasury.command("payout-left")
def payout_left(
    payout_id: Annotated[str, typer.Argument(help="The payout, as the treasury's log names it.")],
    as_json: AsJson = False,
) -> None:
    """End a payout that left the platform's account, and that no ledger of the chain shows.

    First see that the account lacks its amount (`status`): what is ended is never sent again.
    """
    from azu.auth.signatures import ConfirmPayout
    from azu.errors import NotFound

    payouts = with_books(lambda books: books.open_payouts())
    found = next((one for one in payouts if one.payout_id == payout_id), None)
    if found is None:
        raise NotFound(f"no payout {payout_id} is open", param="payout_id", code="payout_not_found")
    moves = [("what is on its way", f"the chain's address {found.address}", found.lamports)]
    carry_out(ConfirmPayout, moves, as_json, payout_id=payout_id)


@treasury.command()
def rotate(
    old_key: Annotated[Path, typer.Argument(help="The file of the platform's key.")],
    new_key: Annotated[Path, typer.Argument(help="The file of the key that replaces it.")],
    as_json: AsJson = False,
) -> None:
    """Replace the platform's key by another one, and move what its address holds; the network has to be down.

    Both keys sign that. What was signed for the old address stays good, and deposits there are credited.
    Once it is done, the command moves what came there later, also while the network runs.
    """
    from azu.launch.platform_rotation import rotated

    moved = rotated(Settings.from_environment(), old_key, new_key)
    show(
        moved,
        as_json,
        lambda facts: (
            f"{facts['platform']} is the platform; set HYPERLIQUID_ADDRESS and "
            f"AZU_PRIVATE_KEY_FILE. {hype_from_lamports(facts['lamports'])} HYPE moved to it"
        ),
    )


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
        (utc(one.time_ms), one.sender, one.amount,
         one.token_name, one.row, one.reason)
        for one in report.transfers
    ]  # fmt: skip
    columns = ["time (UTC)", "sender", "amount", "token", "row", "why"]
    return table(columns, rows, title=f"{report.count} transfers to the platform that were not credited")


@asynccontextmanager
async def _signer() -> "AsyncIterator[RemoteSigner]":
    """Yield the signer of the network that runs in AZU_HOME, as its owner may call it."""
    from azu.launch.sidecars import owners_signer

    signer = owners_signer(Settings.from_environment().money_home)
    try:
        yield signer
    finally:
        await signer.close()


async def _status(books: "Books") -> TreasuryReport:
    totals = await books.totals()
    async with _signer() as signer:
        found = await signer.status()
    held = totals.held_lamports
    return TreasuryReport(
        to_workers_lamports=held.get("worker_paying", 0),
        to_users_lamports=held.get("user_withdrawing", 0),
        revenue_on_its_way_lamports=held.get("platform_paying", 0),
        lost_writes=totals.lost_writes,
        findings=found.findings,
        is_red=found.is_red,
    )


def _drawn_status(report: TreasuryReport) -> "RenderableType":
    rows = [
        ("on its way to workers", hype_from_lamports(report.to_workers_lamports)),
        ("on its way to users", hype_from_lamports(report.to_users_lamports)),
        ("revenue on its way", hype_from_lamports(report.revenue_on_its_way_lamports)),
    ]
    verdicts = [Text("Books and chain agree: payouts are signed.", "green")]
    if report.findings:
        style = "red" if report.is_red else "yellow"
        verdicts = [Text(f"Payouts wait: {finding}", style) for finding in report.findings]
    return Group(table(["", "HYPE"], rows, title="treasury"), *verdicts)


def run_treasury() -> None:
    """Credit deposits and pay workers until stopped; the signer signs what it sends.

    The chain comes from HYPERLIQUID_RPC_URL, the platform from HYPERLIQUID_ADDRESS, the treasury's own state
    from REDIS_HOST, REDIS_PORT and REDIS_PASSWORD. `azu up` sets AZU_BOOKS_URL and AZU_SIGNER_URL, and
    AZU_JOBS_REDIS_URL, the Redis of the jobs; without that both Redis are one.
    """
    import os
    from dataclasses import replace

    from azu.config import load_network
    from azu.errors import ConfigurationError
    from azu.launch.processes import end_with_parent
    from azu.launch.sidecars import BOOKS_URL, JOBS_URL, SIGNER_URL, payout_limit, platforms_in
    from azu.logs import start_logging
    from azu.money.chain.networks import network_at
    from azu.money.treasury.environment import take_variable
    from azu.money.treasury.planning import Threshold
    from azu.money.treasury.process import TreasuryConfig, run

    end_with_parent()
    names = (BOOKS_URL, JOBS_URL, SIGNER_URL)
    books_url, jobs_url, signer_url = (take_variable(os.environ, name) for name in names)
    settings = Settings.from_environment()
    if settings.chain_url is None or settings.platform_address is None or settings.redis_url is None:
        needed = "HYPERLIQUID_RPC_URL, HYPERLIQUID_ADDRESS and REDIS_HOST"
        raise ConfigurationError(f"the treasury needs {needed}")
    if not books_url or not signer_url:
        raise ConfigurationError("the treasury needs AZU_BOOKS_URL and AZU_SIGNER_URL")
    policy = load_network(settings.network).policy
    threshold, limits = policy.payout_threshold_lamports, policy.payout_limits
    config = TreasuryConfig(
        redis_url=settings.redis_url,
        books_url=books_url,
        signer_url=signer_url,
        network=network_at(settings.chain_url),
        platforms=platforms_in(settings.home, settings.platform_address),
        home=settings.home,
        threshold=Threshold(
            threshold,
            _NEW_ACCOUNT_FACTOR * threshold,
            payout_limit(limits.earnings).largest_lamports,
            payout_limit(limits.withdrawals).largest_lamports,
        ),
        jobs_redis_url=jobs_url,
    )
    if config.network.name == "devnet":
        # The official networks count requests; a local chain does not.
        config = replace(config, poll_s=_DEVNET_POLL_S, plan_every_s=1.0)
    password = settings.redis_password
    start_logging("treasury", hidden=[password.get_secret_value()] if password else [])
    asyncio.run(run(config, ready=lambda: print("treasury ready", flush=True)))  # noqa: T201
