"""`azu join`: lend this machine's GPUs to a network."""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from azu.cli.output import AsJson, console, done, show
from azu.errors import AzuError, ConfigurationError
from azu.units import format_bytes, hype_from_lamports

if TYPE_CHECKING:
    from ssl import SSLContext

    from azu.client import Client
    from azu.cluster.lending import LendingTerms
    from azu.launch.membership import AnyTicket
    from azu.launch.ray_nodes import Worker


Word = Annotated[
    str | None,
    typer.Argument(metavar="TICKET", help="What `azu up` printed; `ps` shows it to this machine."),
]
TicketFile = Annotated[
    Path | None, typer.Option(help="A file with the ticket; else AZU_TICKET has it, or it is asked for.")
]
Vram = Annotated[str, typer.Option(help="What each GPU lends, such as 20GiB; without GPUs, this machine.")]
PayoutOption = Annotated[str, typer.Option(help="The address that is paid.")]
Name = Annotated[str | None, typer.Option(help="What the network calls this machine.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Lend the CPU although there are GPUs.")]
Ip = Annotated[str | None, typer.Option(help="The address at which the network reaches this machine.")]
HoursOption = Annotated[str | None, typer.Option(help="Lend in a part of each day only, such as 22-07.")]
MaxCelsius = Annotated[float | None, typer.Option("--max-temperature", help="Pause from so many degrees on.")]
Yields = Annotated[bool, typer.Option("--yield", help="Pause while other programs use the device.")]
Disk = Annotated[str | None, typer.Option(help="What shards take on the disk at most, such as 100GiB.")]
Bandwidth = Annotated[str | None, typer.Option(help="What is fetched in a second at most, such as 20MiB.")]
Background = Annotated[bool, typer.Option("--background", help="Return as soon as it lends.")]
Service = Annotated[bool, typer.Option("--service", help="Write a systemd unit that runs it, and end.")]
Claim = Annotated[bool, typer.Option("--claim", help="Claim the earnings with the wallet here, unasked.")]

# A machine is measured and a node starts in less.
_BACKGROUND_TIMEOUT_S = 300.0
_OFFER_TIMEOUT_S = 20.0


def join(
    vram: Vram,
    payout: PayoutOption,
    ticket: Word = None,
    ticket_file: TicketFile = None,
    name: Name = None,
    cpu: Cpu = False,
    ip: Ip = None,
    hours: HoursOption = None,
    max_celsius: MaxCelsius = None,
    yields: Yields = False,
    disk: Disk = None,
    bandwidth: Bandwidth = None,
    claim: Claim = False,
    background: Background = False,
    service: Service = False,
    as_json: AsJson = False,
) -> None:
    """Lend this machine until Ctrl-C: one Ray node for each GPU, started again when it dies.

    First it says what the machine would hold and could earn now.
    """
    from azu.cli.join_run import join_until_left, place_of
    from azu.config import Settings
    from azu.launch.formats import check_home, mark_lender
    from azu.launch.membership import decode_ticket

    console.stderr = as_json  # the facts alone are on stdout
    word = ticket_word(ticket, ticket_file).strip()
    decoded = decode_ticket(word)
    terms = lending_terms(hours=hours, max_celsius=max_celsius, yields=yields, disk=disk, bandwidth=bandwidth)
    # Raises for what cannot be lent.
    workers = _workers(name or socket.gethostname(), vram, payout, terms, cpu=cpu)
    settings = Settings.from_environment()
    check_home(settings.home)
    mark_lender(settings.home)
    given = {
        "--vram": vram, "--payout": payout, "--name": name, "--ip": ip, "--hours": hours, "--disk": disk,
        "--max-temperature": max_celsius, "--bandwidth": bandwidth, "--cpu": cpu, "--yield": yields,
    }  # fmt: skip
    if service:
        if claim and (client := _client(decoded, settings.home)) is not None:
            _have_claimed(client, workers[0].payout_address, settings.home, unasked=True)
        return _write_service(word, _options(given), settings.home, name, as_json=as_json)
    ip = place_of(decoded, ip, settings.home)
    console.print(Text(f"network {decoded.network}", "dim"))
    client = _client(decoded, settings.home)
    if client is not None and not as_json:
        _show_offer(client, workers, settings.home / "speeds")
    if client is not None and (claim or not as_json):
        _have_claimed(client, workers[0].payout_address, settings.home, unasked=claim)
    if background:
        return _in_background(word, _options(given), settings.home, as_json=as_json)
    join_until_left(
        decoded,
        settings,
        ip,
        name,
        lambda named: _workers(named, vram, payout, terms, cpu=cpu),
        client,
        lambda: show({"pid": os.getpid()}, True, str) if as_json else None,
    )
    return None


def _options(given: "Mapping[str, object]") -> list[str]:
    """Return options as words of a command line; those that were not given are left out."""
    words: list[str] = []
    for name, value in given.items():
        if value is not None and value is not False:
            words += [name] if value is True else [name, str(value)]
    return words


def _in_background(ticket: str, options: list[str], home: Path, *, as_json: bool) -> None:
    from azu.launch.network_process import run_in_background

    # The command line of a process is shown to all of its machine.
    os.environ["AZU_TICKET"] = ticket
    with console.status("Joining in the background"):
        facts = run_in_background(home, _BACKGROUND_TIMEOUT_S, ["join", *options], "join")
    show(
        facts,
        as_json,
        lambda _: done(f"it lends in the background; `kill {facts['pid']}` leaves"),
    )


def _write_service(ticket: str, options: list[str], home: Path, name: str | None, *, as_json: bool) -> None:
    from azu.files import write_private
    from azu.launch.processes import azu_command
    from azu.launch.service import UNIT, unit_path, unit_text

    unit, commands = unit_path(name)
    file = home.absolute() / f"ticket{unit.stem.removeprefix(UNIT)}"
    write_private(file, f"{ticket}\n")
    command = azu_command("join", "--ticket-file", str(file), *options)
    unit.parent.mkdir(parents=True, exist_ok=True)
    unit.write_text(unit_text(command, home, of_root=os.geteuid() == 0))
    facts = {"unit": str(unit), "ticket_file": str(file), "commands": commands}
    show(facts, as_json, lambda _: done(f"{unit} is written. Now run:"))
    for one in commands:
        console.print(one, soft_wrap=True)


def _client(ticket: "AnyTicket", home: Path) -> "Client | None":
    """Return a client of the ticket's network; None where this machine cannot find it."""
    from azu.client import Client
    from azu.client.known_network import known_network
    from azu.client.machine import running_network, stored_credential
    from azu.launch.membership import EnrolmentTicket

    def client(url: str, tls: "SSLContext | None" = None) -> Client:
        # A key of another network, as a variable may have it, is not for this one.
        known = stored_credential(home, url)
        return Client(url, known.api_key if known else "", tls=tls, timeout_s=_OFFER_TIMEOUT_S)

    try:
        if isinstance(ticket, EnrolmentTicket):
            return client(ticket.url, known_network(ticket.url, ticket.network).trust())
        here = running_network(home)
        if here is None or here.network_id != ticket.network:
            return None
        return client(here.url)
    except AzuError as error:
        console.print(Text(error.message, "yellow"))
        return None


def _show_offer(client: "Client", workers: "list[Worker]", speeds: Path) -> None:
    """Say what the machine would hold and could earn, where the network says so."""
    first = workers[0]
    try:
        with console.status("Measuring this machine"):
            speed = first.speed(speeds)
        if speed is None:
            return
        found = client.offer(first.vram_bytes, speed.memory_bytes_per_s, speed.flops_per_s)
    except AzuError as error:
        console.print(Text(f"What this machine would hold is not known: {error.message}", "yellow"))
        return
    each = "this machine" if len(workers) == 1 else f"each of {len(workers)} GPUs"
    held = [f"{one.layers} of {one.num_layers} layers of {one.model_id}" for one in found.pieces]
    console.print(f"Now {each} would hold " + (", ".join(held) if held else _NOTHING))
    gib = format_bytes(len(workers) * first.vram_bytes)
    if found.lamports_per_day:
        day = hype_from_lamports(len(workers) * found.lamports_per_day)
        console.print(
            f"At today's load it could earn {day} HYPE a day: what owners got here in the last days for each "
            f"GiB that they lent for an hour, times {gib} and 24 hours. Only prompts that it runs are paid."
        )
    else:
        console.print("No owner earned anything here in the last days: what it could earn is not known.")


_NOTHING = (
    "nothing: no model runs, or those that run are as fast without it. It gets pieces when more is asked for "
    "or another node leaves."
)


def _have_claimed(client: "Client", payout: str, home: Path, *, unasked: bool) -> None:
    """Have the payout address claim its earnings if its wallet is here, or say how it can."""
    from azu.money.chain.wallet import address_of

    try:
        found = client.earnings() if client.has_key else None
    except AzuError as error:
        console.print(Text(error.message, "yellow"))
        return
    wallet, here = home / "wallet.json", False
    if found is not None and found.address.lower() == payout.lower():
        if found.claimed:
            return
        here = wallet.exists() and address_of(wallet).lower() == payout.lower()
    question = f"Sign with this machine's wallet that {payout} is paid what it earns?"
    if here and (unasked or (sys.stdin.isatty() and typer.confirm(question, default=True))):
        from azu.cli.wallet import unlock

        client.claim_earnings(unlock(home))
        console.print(done(f"{payout} has claimed its earnings"))
        return
    console.print(
        f"What {payout} earns is paid out once it is claimed: with its wallet, `azu login` and "
        "`azu earnings --claim`"
    )


def ticket_word(word: str | None, file: Path | None) -> str:
    """Return the ticket that was given: as a word, in a file, in AZU_TICKET, or else typed at the terminal.

    Raises ConfigurationError where there is none, and where a word and a file are given.
    """
    from azu.files import read_text

    if word is not None and file is not None:
        raise ConfigurationError("give the ticket as a word or in a file, not both", param="ticket")
    if file is not None:
        word = read_text(file)
    word = word or os.environ.get("AZU_TICKET")
    if not word and sys.stdin.isatty():
        word = typer.prompt("Ticket", hide_input=True)
    if not word:
        raise ConfigurationError(
            "no ticket: `azu join TICKET`, `azu join --ticket-file FILE`, or the variable AZU_TICKET",
            param="ticket",
        )
    return word


def lending_terms(
    *,
    hours: str | None = None,
    max_celsius: float | None = None,
    yields: bool = False,
    disk: str | None = None,
    bandwidth: str | None = None,
) -> "LendingTerms":
    """Return the owner's terms; raises InvalidRequest for a text that is none."""
    from azu.cluster.lending import Hours, LendingTerms
    from azu.units import parse_bytes

    return LendingTerms(
        None if hours is None else Hours.parse(hours),
        max_celsius,
        yields,
        None if disk is None else parse_bytes(disk),
        None if bandwidth is None else max(1, parse_bytes(bandwidth)),
    )


def _workers(name: str, vram: str, payout: str, terms: "LendingTerms", *, cpu: bool) -> "list[Worker]":
    """Return one worker for each GPU, or one for the CPU.

    Raises ConfigurationError where they cannot lend so much, or keep to the terms.
    """
    from pydantic import ValidationError

    from azu.config import LocalWorker
    from azu.config.settings import configuration_error
    from azu.engine.device import CpuMeter, device_bytes
    from azu.launch.ray_nodes import Worker, check_lent, cuda_devices

    gpus = () if cpu else cuda_devices()
    try:
        checked = LocalWorker(name=name, vram=vram, payout=payout)
    except ValidationError as error:
        raise configuration_error(error) from error
    names = [f"{checked.name}-{index}" for index in range(len(gpus))] if len(gpus) > 1 else [checked.name]
    workers = [
        Worker(index, named, checked.vram, checked.payout, gpu, terms)
        for index, (named, gpu) in enumerate(zip(names, gpus or (None,), strict=True))
    ]
    check_lent(workers, device_bytes)
    if terms.disk_bytes is not None and terms.disk_bytes < checked.vram:
        raise ConfigurationError("the disk has to take what the device lends: give --disk more", param="disk")
    if terms.max_celsius is not None and not gpus and CpuMeter().celsius() is None:
        raise ConfigurationError("this machine shows no temperature", param="max_temperature")
    return workers
