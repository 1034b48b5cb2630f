"""`azu join`: lend this machine's GPUs to a network."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from azu.cli.output import console, done
from azu.errors import AzuError, ConfigurationError, Conflict, OtherVersion, Unauthenticated
from azu.units import format_bytes

if TYPE_CHECKING:
    from azu.api.network import RestartResponse
    from azu.cluster.lending import LendingTerms
    from azu.config import Settings
    from azu.launch.membership import ClusterAccess, Membership, Ticket, TlsFiles
    from azu.launch.processes import ProcessGroup
    from azu.launch.ray_nodes import Worker
    from azu.launch.unix_users import UnixUser


_START_TIMEOUT_S = 120.0
_WATCH_S = 0.5
_MOST_JOINS = 100
# A node that stays up asks the network this often whether its access is still good.
_CHECK_ACCESS_EVERY_S = 600.0
# Where that is a look at a port of this machine.
_CHECK_HEAD_EVERY_S = 10.0

Word = Annotated[
    str | None,
    typer.Argument(metavar="[TICKET]", help="What `azu up` printed; `ps` shows it to this machine."),
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
) -> None:
    """Lend this machine until Ctrl-C: one Ray node for each GPU, started again when it dies."""
    from azu.config import Settings
    from azu.launch.formats import check_home
    from azu.launch.membership import EnrolmentTicket, decode_ticket, membership_of
    from azu.launch.processes import address_towards, stop_signals_raised

    decoded = decode_ticket(ticket_word(ticket, ticket_file))
    terms = lending_terms(hours=hours, max_celsius=max_celsius, yields=yields, disk=disk, bandwidth=bandwidth)
    _workers(name or socket.gethostname(), vram, payout, terms, cpu=cpu)  # raises for what cannot be lent
    settings = Settings.from_environment()
    check_home(settings.home)
    user = _ray_user(settings)
    if isinstance(decoded, EnrolmentTicket):
        # The certificate has to contain the address that Ray gives the node.
        ip = ip or address_towards(decoded.url)
    else:
        ip = _on_the_heads_machine(decoded, ip, settings.home)
    console.print(Text(f"network {decoded.network}", "dim"))
    with _own_name(name) as machine, stop_signals_raised():
        workers = _workers(machine, vram, payout, terms, cpu=cpu)
        membership = membership_of(
            decoded, settings.home, name=machine, host=ip, money_home=settings.money_home
        )
        while True:
            _lend(membership, workers, ip, settings.home, user)


def ticket_word(word: str | None, file: Path | None) -> str:
    """Return the ticket that was given: as a word, in a file, in AZU_TICKET, or else typed at the terminal.

    Raises ConfigurationError where there is none, and where a word and a file are given.
    """
    import os
    import sys

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


@contextmanager
def _own_name(given: str | None) -> Iterator[str]:
    """Yield a name that no other `azu join` of this machine has: the given one, or one made of the host's.

    Raises Conflict where the given one is taken.
    """
    from azu.launch.held import held

    first = given or socket.gethostname()
    others = (f"{first}.{number}" for number in range(2, _MOST_JOINS) if given is None)
    with ExitStack() as stack:
        for name in (first, *others):
            if stack.enter_context(held(f"node-{name}")):
                yield name
                return
    raise Conflict(f"an `azu join` of this machine lends as {first} already: give another --name")


def _on_the_heads_machine(ticket: "Ticket", ip: str | None, home: Path) -> str:
    """Return the address of a node without encryption; raises ConfigurationError on another machine."""
    from azu.client.machine import running_network
    from azu.launch.membership import EARLIER_START, LOOPBACK, head_answers

    if ip in (None, LOOPBACK) and head_answers(f"{LOOPBACK}:{ticket.port}"):
        return LOOPBACK
    here = running_network(home)
    if here is not None and here.network_id == ticket.network:
        raise ConfigurationError(EARLIER_START, param="ticket")
    raise ConfigurationError(
        "this network is not encrypted: its ticket is for the head's own machine, while this start of it "
        "runs; others join after `azu up --ip ADDRESS`",
        param="ticket",
    )


def _ray_user(settings: "Settings") -> "UnixUser | None":
    """Return the user that runs the network's code on a machine of root; None for the one of this process."""
    import os

    from azu.launch.network_users import ray_user

    if os.geteuid() != 0 or settings.one_user:
        return None
    try:
        return ray_user(settings)
    except ConfigurationError as error:
        console.print(Text(f"The network runs its code here as root: {error.message}", "yellow"))
        return None


def _lend(
    membership: "Membership", workers: "list[Worker]", ip: str, home: Path, user: "UnixUser | None"
) -> None:
    """Run the nodes until they have to be started again with a new access."""
    import tempfile

    from azu.files import write_private
    from azu.launch.network_users import shared_file
    from azu.launch.processes import ProcessGroup
    from azu.launch.ray_nodes import RayHost, socket_folder

    access = membership.access()
    with (
        # A short path: the paths of Ray's sockets have a limit.
        tempfile.TemporaryDirectory(prefix="azu-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        socket_folder(Path(folder) / "ray", user) as sessions,
        ProcessGroup(home / "logs", user=user) as nodes,
    ):
        token, tls = Path(folder) / "token", access.tls
        if user is None:
            write_private(token, access.token)
        else:
            Path(folder).chmod(0o711)
            files = Path(folder) / "files"
            token = shared_file(files, "token", access.token, user)
            tls = _shared(tls, files, user)
        host = RayHost(sessions, token, ip, tls=tls, home=home if user is None else user.home)

        def enrol(worker: "Worker", node_id: str) -> None:
            speed = worker.work_bytes_per_s(home / "speeds")
            membership.enrol(worker.name, worker.payout_address, node_id, speed)

        for worker in workers:
            enrols = partial(enrol, worker)
            nodes.start(host.worker(access.head, worker, enrols, membership.new_node_id))
        _watch(nodes, workers, membership, access, lambda: _shared(access.tls, Path(folder) / "files", user))


def _shared(tls: "TlsFiles | None", folder: Path, user: "UnixUser | None") -> "TlsFiles | None":
    """Return the certificate's files where the user that runs Ray can read them."""
    from dataclasses import astuple

    from azu.launch.membership import TlsFiles
    from azu.launch.network_users import shared_file

    if tls is None or user is None:
        return tls
    return TlsFiles(*(shared_file(folder, path.name, path.read_text(), user) for path in astuple(tls)))


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


def _watch(
    nodes: "ProcessGroup",
    workers: "list[Worker]",
    membership: "Membership",
    access: "ClusterAccess",
    share: Callable[[], object],
) -> None:
    """Wait until all nodes have joined, then start again those that end or need a new certificate.

    `share` puts a new one where they read it. Returns when the network was started again; raises
    Unauthenticated when they may no longer join, OtherVersion when the network is of a later release.
    """
    from azu.launch.membership import EARLIER_START
    from azu.launch.ray_nodes import REFUSED, STARTED
    from azu.launch.renewal import Renewal

    def has_joined(worker: "Worker") -> bool:
        # Where the token is renewed, `_later` finds the new one.
        if access.life is None and nodes.has_printed(worker.name, REFUSED):
            raise Unauthenticated(EARLIER_START)
        return nodes.has_printed(worker.name, STARTED)

    life, renewal, checked_s = access.life, None, time.monotonic()
    check_s = _CHECK_HEAD_EVERY_S if life is None else _CHECK_ACCESS_EVERY_S
    if life is not None:
        names = [worker.name for worker in workers]
        renewal = Renewal(names, life, lambda name: _asked(membership, name), nodes.restart)
        check_s = min(check_s, life.window.total_seconds() / 6)
    with console.status(Text(f"Joining {access.head}")) as status:
        for worker in workers:
            nodes.wait_until(worker.name, partial(has_joined, worker), _START_TIMEOUT_S)
            lent = f"{worker.name} lends {format_bytes(worker.vram_bytes)}"
            console.print(done(f"{lent}, paid to {worker.payout_address}"))
        while True:
            revived = nodes.revive()
            for name in revived:
                console.print(Text(f"{name} had ended and was started again", "yellow"))
            if revived or time.monotonic() - checked_s > check_s:
                checked_s = time.monotonic()
                later = _later(membership)
                if later is not None and not access.is_of_same_run(later):
                    return
                if renewal is not None and later is not None and later.life is not None:
                    share()
                    renewal.take(later.life, datetime.now(UTC))
            if renewal is not None and (renewed := renewal.step(datetime.now(UTC))) is not None:
                console.print(Text(f"{renewed} was started again, with a new certificate", "dim"))
            joined = sum(map(has_joined, workers))
            status.update(Text(f"{joined} of {len(workers)} nodes joined to {access.head}; Ctrl-C leaves"))
            time.sleep(_WATCH_S)


def _later(membership: "Membership") -> "ClusterAccess | None":
    """Return what joins the network now; None while it does not answer."""
    try:
        return membership.access()
    except (Unauthenticated, OtherVersion):
        raise
    except AzuError as error:
        console.print(Text(error.message, "yellow"))
        return None


def _asked(membership: "Membership", name: str) -> "RestartResponse | None":
    """Return whether it is a node's turn to be started again; None where the network does not say so."""
    try:
        return membership.ask_restart(name)
    except AzuError as error:
        console.print(Text(error.message, "yellow"))
        return None
