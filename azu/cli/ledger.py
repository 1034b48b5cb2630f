"""`azu ledger`: check the books, repair their file, and decide about money that is held or disputed."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.text import Text

from azu.cli.admin_command import Moves, carry_out, with_books
from azu.cli.output import AsJson, show, table, utc
from azu.clock import wall_clock_ms
from azu.config import Settings
from azu.errors import ConfigurationError
from azu.units import format_bytes, hype_from_lamports, lamports_from_hype

if TYPE_CHECKING:
    from rich.console import RenderableType

    from azu.auth.signatures import PayHeld, ReleaseHeld
    from azu.launch.backup import Backup, Restored
    from azu.money.books import Books, HeldMoney, ReversibleJobs
    from azu.money.ledger.audit import Audit
    from azu.money.ledger.durability import FileRepair


# While the chain disagrees: a deposit or payout may be on its way into the books.
_MORE_AUDITS = 4
_AUDIT_AGAIN_S = 2.0


ledger = typer.Typer(no_args_is_help=True)
JobId = Annotated[str, typer.Argument(help="The job's id.")]
NodeId = Annotated[str, typer.Argument(help="The node's id, as `azu ledger held` shows it.")]
Recipient = Annotated[str, typer.Argument(help="The address that gets it.")]
Amount = Annotated[
    str | None, typer.Option("--amount", help="HYPE, for example 0.5; without it all that has matured.")
]


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
    chain = None if wallet_lamports is not None else _chain(Settings.from_environment())
    report = with_books(lambda books: _audit(books, chain, wallet_lamports, since))
    if report.agrees:
        _note("audit")
    show(report, as_json, _drawn_audit)
    if not report.agrees:
        raise typer.Exit(1)


@ledger.command()
def repair(
    place: Annotated[
        Path | None,
        typer.Argument(help="An append-only file, or the folder of a store; without it that of AZU_HOME."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Cut a torn tail back to the last whole transfer and print what was dropped; stop the store before."""
    from azu.launch.formats import check_home
    from azu.money.ledger.durability import append_only_files
    from azu.money.ledger.durability import repair as cut_tail

    if place is None:
        settings = Settings.from_environment()
        check_home(settings.home)
        place = settings.money_home / "redis"
    show(cut_tail(append_only_files(place) if place.is_dir() else (place,)), as_json, _drawn_repair)


@ledger.command()
def backup(
    file: Annotated[Path, typer.Argument(help="A new file; keep it as safe as the platform's key.")],
    as_json: AsJson = False,
) -> None:
    """Copy the money of AZU_HOME into one file, also while the network runs.

    The platform's key on a real chain is not in it, nor are jobs and models. It has the keys of the network's
    authorities, and on a devnet all keys.
    """
    from azu.launch.backup import back_up
    from azu.launch.formats import check_home

    settings = Settings.from_environment()
    check_home(settings.home)
    if settings.redis_host is not None:
        raise ConfigurationError(
            "the store at REDIS_HOST is your own: copy it by its own means; AZU_HOME has no copy of it",
            param="REDIS_HOST",
        )
    made = back_up(settings.money_home, file)
    _note("backup")
    show(made, as_json, _drawn_backup)


def _note(what: str) -> None:
    """Note for the metrics that a command was carried out."""
    from azu.money.treasury.survey import note_done

    note_done(Settings.from_environment().money_home, what, wall_clock_ms())


@ledger.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A file that `azu ledger backup` made.")],
    as_json: AsJson = False,
) -> None:
    """Put a copy into an AZU_HOME that has no money yet.

    What happened after the copy was made is not in it: docs/operations.md, Backup, says what to do then.
    """
    from azu.launch.backup import restore as put_back

    settings = Settings.from_environment()
    show(put_back(file, settings.money_home, settings.home), as_json, _drawn_restored)


@ledger.command()
def held(as_json: AsJson = False) -> None:
    """List the money that waits for an admin: of nodes, of disputed jobs, and in suspense."""
    show(with_books(lambda books: books.held()), as_json, _drawn_held)


@ledger.command()
def reversible(
    address: Annotated[str, typer.Argument(help="Of a payer, or of a node's owner.")], as_json: AsJson = False
) -> None:
    """List the jobs that an address paid for, or was paid for, and that have not matured.

    A job that a thief settled is in no list of its payer's jobs: it is here.
    """
    from azu.addresses import parse_address

    of = parse_address(address)
    found = with_books(lambda books: books.reversible(of))
    show(found, as_json, _drawn_reversible)


@ledger.command()
def reverse(job_id: JobId, as_json: AsJson = False) -> None:
    """Give back to its payer what a job paid out, while it is disputed or has not matured."""
    from azu.auth.signatures import ReverseJob
    from azu.errors import NotFound

    outcome = with_books(lambda books: books.ended(job_id))
    if outcome is None:
        raise NotFound(f"no job {job_id} has ended", code="job_not_found")
    paid = outcome.receipt
    sources = {
        "platform": paid.platform_lamports,
        **{f"worker {address}": lamports for address, lamports in paid.worker_lamports.items()},
        "held of nodes": paid.held_lamports,
    }
    moves = [(source, f"user {paid.address}", lamports) for source, lamports in sources.items() if lamports]
    carry_out(ReverseJob, moves, as_json, job_id=job_id)


@ledger.command()
def dismiss(job_id: JobId, as_json: AsJson = False) -> None:
    """Give what is held of a disputed job to those who earned it."""
    from azu.auth.signatures import DismissDispute
    from azu.errors import NotFound

    disputes = with_books(lambda books: books.held()).disputes
    lamports = next((one.lamports for one in disputes if one.job_id == job_id), None)
    if lamports is None:
        raise NotFound(f"{job_id} is not disputed", code="no_dispute")
    moves = [(f"dispute of {job_id}", "those who earned it", lamports)]
    carry_out(DismissDispute, moves, as_json, job_id=job_id)


@ledger.command("pay-held")
def pay_held(node_id: NodeId, address: Recipient, amount: Amount = None, as_json: AsJson = False) -> None:
    """Give what is held of a node's work to an address as its earnings."""
    from azu.auth.signatures import PayHeld

    _from_held(PayHeld, "worker", node_id, address, amount, as_json)


@ledger.command("release-held")
def release_held(node_id: NodeId, address: Recipient, amount: Amount = None, as_json: AsJson = False) -> None:
    """Give what is held of a node's work back to a user's account."""
    from azu.auth.signatures import ReleaseHeld

    _from_held(ReleaseHeld, "user", node_id, address, amount, as_json)


@ledger.command("remove-node")
def remove_node(node_id: NodeId, as_json: AsJson = False) -> None:
    """Hold what a node earns from now on; `azu ticket revoke` also keeps its machine from coming back."""
    from azu.auth.signatures import RemoveNode

    carry_out(RemoveNode, [], as_json, node_id=node_id)


def _from_held(
    kind: "type[PayHeld | ReleaseHeld]",
    whose: str,
    node_id: str,
    address: str,
    amount: str | None,
    as_json: bool,
) -> None:
    from azu.addresses import parse_address
    from azu.errors import NotFound

    found = next(
        (one for one in with_books(lambda books: books.held()).nodes if one.node_id == node_id), None
    )
    if found is None:
        raise NotFound(f"nothing is held of {node_id}", param="node_id", code="nothing_held")
    recipient = parse_address(address)
    lamports = found.matured_lamports if amount is None else lamports_from_hype(amount)
    moves: Moves = [(f"held of {node_id}", f"{whose} {recipient}", lamports)]
    carry_out(kind, moves, as_json, node_id=node_id, address=recipient, lamports=lamports)


def _drawn_reversible(report: "ReversibleJobs") -> "RenderableType":
    rows = [
        (
            one.job_id,
            one.payer,
            utc(one.matures_at_ms),
            ", ".join(
                f"{account.removesuffix(':earned').replace(':', ' ')} {hype_from_lamports(lamports)}"
                for account, lamports in one.accounts.items()
            ),
        )
        for one in report.jobs
    ]
    title = "jobs that can be reversed"
    if report.num_left_out:
        title += f", the largest of {len(rows) + report.num_left_out}"
    return table(["job", "payer", "matures (UTC)", "HYPE paid to"], rows, title=title)


def _drawn_held(found: "HeldMoney") -> Group:
    nodes = [
        (one.node_id, one.payout, hype_from_lamports(one.lamports), hype_from_lamports(one.matured_lamports))
        for one in found.nodes
    ]
    disputes = [(one.job_id, one.payer, hype_from_lamports(one.lamports)) for one in found.disputes]
    rows = [(one.row, one.sender, hype_from_lamports(one.lamports)) for one in found.suspense]
    return Group(
        table(["node", "enrolled for", "HYPE", "matured HYPE"], nodes, title="held of nodes"),
        table(["job", "payer", "HYPE"], disputes, title="disputed jobs"),
        table(["row", "sender", "HYPE"], rows, title="in suspense"),
    )


async def _audit(
    books: "Books", chain: tuple[str, tuple[str, ...]] | None, wallet_lamports: int | None, since: int
) -> "Audit":
    report = await _audit_once(books, chain, wallet_lamports, since)
    for _ in range(_MORE_AUDITS):
        if report.agrees or chain is None:
            break
        await asyncio.sleep(_AUDIT_AGAIN_S)
        report = await _audit_once(books, chain, wallet_lamports, since)
    return report


async def _audit_once(
    books: "Books", chain: tuple[str, tuple[str, ...]] | None, wallet_lamports: int | None, since: int
) -> "Audit":
    if chain is not None:
        wallet_lamports = await _wallet(*chain)
    return await books.audit(wallet_lamports, since)


def _chain(settings: Settings) -> tuple[str, tuple[str, ...]] | None:
    """Return the chain's URL and the platform's addresses there, if they are known."""
    from azu.launch.sidecars import devnet_of, platforms_in

    if settings.chain_url is not None and settings.platform_address is not None:
        return settings.chain_url, platforms_in(settings.money_home, settings.platform_address)
    devnet = (
        devnet_of(settings.money_home) if settings.redis_url is None and settings.chain_url is None else None
    )
    if devnet is None:
        return None
    return devnet.url, platforms_in(settings.money_home, devnet.platform_address)


async def _wallet(chain_url: str, platforms: tuple[str, ...]) -> int:
    from azu.money.chain.api import ChainClient
    from azu.money.chain.networks import network_at
    from azu.money.chain.rows import balance_of

    chain = ChainClient(network_at(chain_url))
    try:
        return await balance_of(chain, platforms)
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


def _drawn_backup(made: "Backup") -> Text:
    return Text(
        f"{made.files} files, {format_bytes(made.bytes)}, as they were at {utc(made.made_at_ms)} UTC.\n"
        "What happens from now on is not in this copy.",
        "green",
    )


def _drawn_restored(done: "Restored") -> Text:
    made = done.backup
    age_s = (wall_clock_ms() - made.made_at_ms) // 1000
    cut = f"Half a write was cut off: {done.cut.dropped_bytes} bytes.\n" if done.cut.dropped_bytes else ""
    return Text(
        f"{made.files} files, {format_bytes(made.bytes)}, are as they were at {utc(made.made_at_ms)} UTC.\n"
        f"{cut}Deposits, jobs and payouts of the {age_s} s since then are missing.\n"
        "Next: azu up, then azu treasury status.",
        "yellow",
    )


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
