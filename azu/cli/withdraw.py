"""`azu withdraw`: money back to the wallet."""

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from azu.cli.credentials import open_client
from azu.cli.output import AsJson, console, show
from azu.units import lamports_from_hype

if TYPE_CHECKING:
    from azu.api.accounts import WithdrawalLine


_POLL_S = 0.5
_TIMEOUT_S = 120.0
_DECIDED = ("paid", "refused")


def withdraw(
    amount: Annotated[str, typer.Argument(help="HYPE, for example 0.5")], as_json: AsJson = False
) -> None:
    """Send HYPE of your balance back to the wallet; exit 0 once the chain shows it."""
    from azu.cli.wallet import unlock
    from azu.config import Settings

    lamports = lamports_from_hype(amount)
    wallet = unlock(Settings.from_environment().home)
    client = open_client()
    with console.status(f"Signing the withdrawal of {amount} HYPE") as status:
        state = client.withdraw(wallet, lamports)
        deadline = time.monotonic() + _TIMEOUT_S
        while state.state not in _DECIDED and time.monotonic() < deadline:
            status.update(Text(f"The withdrawal of {amount} HYPE is {state.state}"))
            time.sleep(_POLL_S)
            state = client.withdrawal(state.nonce)
    show(state, as_json, lambda found: _drawn(found, amount, wallet.address))
    if state.state != "paid":
        raise typer.Exit(1)


def _drawn(found: "WithdrawalLine", amount: str, address: str) -> Text:
    match found.state:
        case "paid":
            return Text(f"{amount} HYPE are back at {address}")
        case "refused":
            return Text(f"refused: {found.reason}", "red")
        case _:
            return Text(f"still {found.state}; it goes on by itself, and is in `azu balance`", "yellow")
