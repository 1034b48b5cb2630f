"""What an admin's wallet signs and the books carry out, for the commands that decide about money."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from azu.cli.output import Listing, console, done, show, table
from azu.config import Settings
from azu.units import hype_from_lamports

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount

    from azu.auth.signatures import AdminCommand
    from azu.money.books import Books

COMMAND_LIFE_MS = 600_000
_NONCE_BITS = 62
_Answer = TypeVar("_Answer")
# From and to whom, and lamports.
Moves = list[tuple[str, str, int]]


def with_books(act: Callable[["Books"], Awaitable[_Answer]]) -> _Answer:
    """Return what `act` makes of the books of the network that runs in AZU_HOME, as their owner."""
    from azu.launch.sidecars import owners_books

    async def run() -> _Answer:
        books = owners_books(Settings.from_environment().money_home)
        try:
            return await act(books)
        finally:
            await books.close()

    return asyncio.run(run())


def carry_out(kind: Callable[..., "AdminCommand"], moves: Moves, as_json: bool, **fields: Any) -> None:
    """Print what a command of a kind moves, sign it with the admin's wallet, and have the books carry it out.

    `fields` are those of the kind, without nonce and end.
    """
    from azu.auth.signatures import sign_command
    from azu.clock import wall_clock_ms

    settings = Settings.from_environment()
    if not as_json:
        console.print(_drawn(moves))
    wallet, platform = admin_wallet(settings), platform_of(settings)
    end = {"nonce": secrets.randbits(_NONCE_BITS), "expires_at_ms": wall_clock_ms() + COMMAND_LIFE_MS}
    command = kind(**fields, **end)
    text = sign_command(wallet, command, platform)
    with_books(lambda books: books.command(text))
    lines = [{"from": source, "to": target, "lamports": lamports} for source, target, lamports in moves]
    carried = {"command": command.kind, **fields, "admin": wallet.address.lower(), "moved": lines}
    show(carried, as_json, lambda _: done(f"signed by {wallet.address}, and carried out"))


def admin_wallet(settings: Settings) -> "LocalAccount":
    """Return the wallet of the devnet's admin, or where the chain is configured this machine's wallet."""
    from azu.cli.wallet import unlock
    from azu.launch.sidecars import devnet_admin

    of_devnet = devnet_admin(settings.money_home) if settings.chain_url is None else None
    return of_devnet or unlock(settings.home)


def platform_of(settings: Settings) -> str:
    """Return the platform's address; raises ConfigurationError where it is not known."""
    from azu.errors import ConfigurationError
    from azu.launch.sidecars import devnet_of

    if settings.chain_url is not None and settings.platform_address is not None:
        return settings.platform_address
    devnet = devnet_of(settings.money_home) if settings.chain_url is None else None
    if devnet is None:
        raise ConfigurationError("HYPERLIQUID_RPC_URL and HYPERLIQUID_ADDRESS have to name the platform")
    return devnet.platform_address


def _drawn(moves: Moves) -> Listing:
    rows = [(source, target, hype_from_lamports(lamports)) for source, target, lamports in moves]
    return table(["from", "to", "HYPE"], rows, title="what moves")
