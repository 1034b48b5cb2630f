"""`azu login`, `deposit`, `balance`, `earnings`: the account of a wallet's owner."""

import shlex
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from azu.cli.credentials import no_key, open_client, url_of
from azu.cli.output import AsCsv, AsJson, Exact, Listing, amount, console, day, show, show_csv, table, unit
from azu.clock import wall_clock_ms
from azu.units import hype_from_lamports, lamports_from_hype

if TYPE_CHECKING:
    from azu.api.accounts import BalanceResponse, EarningsResponse


_CREDIT_ATTEMPTS = 20
_DAY_S = 86_400
_STATED_DAYS = 30

Limit = Annotated[str | None, typer.Option(help="The most HYPE that the key may ever spend.")]
Days = Annotated[int | None, typer.Option(min=1, help="How many days the key is valid.")]


def key_bounds(limit: str | None, days: int | None) -> dict[str, int | None]:
    """Return the bounds of a new key as `Client.login` takes them."""
    return {
        "expires_in_s": None if days is None else days * _DAY_S,
        "spend_limit_lamports": None if limit is None else lamports_from_hype(limit),
    }


def login(
    network: Annotated[
        str | None,
        typer.Argument(metavar="URL#ID", help="What `azu up` printed; else the network that runs here."),
    ] = None,
    label: Annotated[str, typer.Option(help="A name for the key, to tell it from others.")] = "cli",
    limit: Limit = None,
    days: Days = None,
    show_it: Annotated[
        bool, typer.Option("--show", help="Print URL and key of before as lines for a shell, and open none.")
    ] = False,
) -> None:
    """Open an API key with the wallet's signature and keep it on this machine, with the network's id."""
    from azu.cli.wallet import unlock
    from azu.client import Client
    from azu.client.http import trusting
    from azu.client.known_network import known_network, split_id
    from azu.client.machine import Credential, running_network, store_credential, stored_credential
    from azu.config import Settings
    from azu.errors import Unauthenticated

    settings = Settings.from_environment()
    url, given_id = split_id(network or url_of(settings))
    known, running = stored_credential(settings.home, url), running_network(settings.home)
    if show_it:
        if known is None:
            raise no_key(url)
        typer.echo(f"export AZU_URL={shlex.quote(url)} AZU_API_KEY={shlex.quote(known.api_key)}")
        return
    if not given_id and known is not None:
        given_id = known.network_id
    if not given_id and running is not None and running.url == url:
        given_id = running.network_id
    tls = None if settings.tls_ca is None else trusting(settings.tls_ca)
    found = known_network(url, given_id, tls=tls)
    if not given_id:
        console.print(Text(f"not checked: the network's id is {found.network_id}, compare it", "yellow"))
    is_other = not given_id and known is not None and found.platform != known.platform
    if is_other and known is not None and known.platform not in found.former:
        message = f"the platform at {url} is {found.platform}, not {known.platform} as at the last login"
        raise Unauthenticated(f"{message}: ask its owner for the network's id, then `azu login URL#ID`")
    if is_other or found.is_changed:
        text = f"the platform is {found.platform} now; its old key, {found.former[0]}, has signed that"
        advice = "compare it with the owner's, since who stole the old key could sign this too"
        console.print(Text(f"{text}. The network's id is {found.network_id}: {advice}", "yellow"))
    if found.is_changed:
        given_id = found.network_id
    wallet = unlock(settings.home)
    client = Client(url, "", tls=tls or found.trust(), platform=found.platform)
    api_key = client.login(wallet, label=label, **key_bounds(limit, days))
    credential = Credential(
        api_key, wallet.address.lower(), found.platform, given_id, found.authority, found.former
    )
    path = store_credential(settings.home, url, credential)
    console.print(f"Logged in to {url} as {wallet.address}; the key is in {path}")
    day_limit = client.platform().key_day_lamports
    if limit is None and day_limit is not None:
        console.print(
            f"The key spends up to {hype_from_lamports(day_limit)} HYPE in a day; --limit sets another"
        )
    if url != url_of(settings):
        console.print(f"export AZU_URL={url}", soft_wrap=True)


def deposit(
    hype: Annotated[str, typer.Argument(metavar="AMOUNT", help="HYPE, for example 0.5")],
    as_json: AsJson = False,
) -> None:
    """Move HYPE from the wallet to the platform and wait for the credit."""
    from azu.cli.wallet import unlock
    from azu.config import Settings
    from azu.errors import DeadlineExceeded
    from azu.money.chain.wallet import transfer_hype

    lamports = lamports_from_hype(hype)
    wallet = unlock(Settings.from_environment().home)
    client = open_client()
    platform = client.platform()
    with console.status(f"Signing and sending {hype} HYPE") as status:
        tx_hash = transfer_hype(wallet, platform.address, lamports, chain_url=platform.chain_url)
        for _ in range(_CREDIT_ATTEMPTS):
            status.update(f"Waiting for the credit of {tx_hash}")
            state = client.deposit(tx_hash, wallet.address)
            if state.status == "credited":
                break
        else:
            raise DeadlineExceeded(f"{tx_hash} is on the chain; the network has not credited it yet")
    show(state, as_json, lambda s: f"Credited {hype_from_lamports(s.lamports)} HYPE ({s.transfer_id})")


def balance(exact: Exact = False, as_json: AsJson = False) -> None:
    """Show what the key's address can spend and what its running jobs have reserved."""
    show(open_client().balance(), as_json, lambda found: _balance(found, exact))


def earnings(
    claim: Annotated[
        bool, typer.Option("--claim", help="Sign with the wallet that its address shall be paid.")
    ] = False,
    as_csv: AsCsv = False,
    exact: Exact = False,
    as_json: AsJson = False,
) -> None:
    """Show what the key's address earned by lending, what is being paid and what was paid.

    With --csv: what it earned in the last 30 days, a line for each day (UTC) and model.
    """
    client = open_client()
    if claim:
        from azu.cli.wallet import unlock
        from azu.config import Settings

        client.claim_earnings(unlock(Settings.from_environment().home))
    if as_csv:
        show_csv(_days(client.earnings(days=_STATED_DAYS), exact))
    else:
        show(client.earnings(), as_json, lambda found: _earnings(found, exact))


def _days(found: "EarningsResponse", exact: bool) -> list[dict[str, object]]:
    """Return a line of a statement for each day and model, the oldest first."""
    sums: Counter[tuple[str, str]] = Counter()
    # Of the first day only some hours are known.
    first = day(wall_clock_ms() - _STATED_DAYS * _DAY_S * 1000)
    for one in reversed(found.by_hour):
        if (at := day(one.at_ms)) != first:
            sums[at, one.model_id] += one.lamports
    return [
        {
            "day_utc": at,
            "address": found.address,
            "model": model_id,
            f"earned_{unit(exact).lower()}": amount(lamports, exact),
        }
        for (at, model_id), lamports in sums.items()
    ]


def _balance(found: "BalanceResponse", exact: bool) -> Listing:
    named = [
        ("available", found.available_lamports),
        ("reserved by running jobs", found.reserved_lamports),
        ("on its way back", found.withdrawing_lamports),
    ]
    rows = [(name, amount(lamports, exact)) for name, lamports in named]
    return table(["", unit(exact)], rows, title=found.address)


def _earnings(found: "EarningsResponse", exact: bool) -> Listing:
    missing = max(0, found.payout_threshold_lamports - found.earned_lamports)
    named = [
        ("earned, not yet paid", found.earned_lamports),
        ("on its way", found.paying_lamports),
        ("paid", found.paid_lamports),
        ("missing for the next payout", missing),
    ]
    rows = [(name, amount(lamports, exact)) for name, lamports in named]
    claimed = "claimed" if found.claimed else "not claimed: run `azu earnings --claim` to be paid"
    return table(["", unit(exact)], rows, title=f"{found.address}, {claimed}")
