"""`azu join`: lend this machine's GPUs to a network."""

import socket
import time
from typing import TYPE_CHECKING, Annotated

import typer

from azu.cli.output import console
from azu.units import format_bytes

if TYPE_CHECKING:
    from azu.cli.network.children import Children
    from azu.cli.network.ray_nodes import Worker

_START_TIMEOUT_S = 120.0
_WATCH_S = 0.5

Word = Annotated[str, typer.Argument(metavar="TICKET", help="What `azu up` printed.")]
Vram = Annotated[str, typer.Option(help="What each GPU lends, such as 20GiB; without GPUs, this machine.")]
Payout = Annotated[str, typer.Option(help="The address that is paid.")]
Name = Annotated[str | None, typer.Option(help="What the network calls this machine.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Lend the CPU although there are GPUs.")]
Ip = Annotated[str | None, typer.Option(help="The address at which the network reaches this machine.")]


def join(
    ticket: Word, vram: Vram, payout: Payout, name: Name = None, cpu: Cpu = False, ip: Ip = None
) -> None:
    """Lend this machine until Ctrl-C: one Ray node for each GPU, started again when it dies."""
    import tempfile
    from pathlib import Path

    from azu.cli.network.children import Children
    from azu.cli.network.interrupts import ending_as_interrupt
    from azu.cli.network.ray_nodes import RayHost
    from azu.cli.network.tickets import Ticket
    from azu.cli.private_file import write_private
    from azu.config import Settings

    opened = Ticket.decode(ticket)
    workers = _workers(name or socket.gethostname(), vram, payout, cpu=cpu)
    home = Settings.from_environment().home
    with (
        ending_as_interrupt(),
        # Short, or the paths of Ray's sockets would be too long.
        tempfile.TemporaryDirectory(prefix="azu-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        Children(home / "logs") as nodes,
    ):
        host = RayHost(Path(folder), Path(folder) / "token", ip)
        write_private(host.token_path, opened.token)
        for worker in workers:
            nodes.start(host.worker(opened.address, worker))
        _watch(nodes, workers, opened.address)


def _workers(name: str, vram: str, payout: str, *, cpu: bool) -> "list[Worker]":
    """Return one worker for each GPU, or one for the CPU."""
    from pydantic import ValidationError

    from azu.cli.network.gpus import cuda_devices
    from azu.cli.network.ray_nodes import Worker
    from azu.config import LocalWorker
    from azu.config.fields import refused

    gpus = () if cpu else cuda_devices()
    try:
        checked = LocalWorker(name=name, vram=vram, payout=payout)
    except ValidationError as error:
        raise refused(error) from error
    names = [f"{checked.name}-{index}" for index in range(len(gpus))] if len(gpus) > 1 else [checked.name]
    return [
        Worker(index, named, checked.vram, checked.payout, gpu)
        for index, (named, gpu) in enumerate(zip(names, gpus or (None,), strict=True))
    ]


def _watch(nodes: "Children", workers: "list[Worker]", address: str) -> None:
    """Wait until all nodes have joined, then keep them joined, telling what happens."""
    from azu.cli.network.ray_nodes import STARTED

    with console.status(f"Joining {address}") as status:
        for worker in workers:
            nodes.wait_until_said(worker.name, STARTED, _START_TIMEOUT_S)
            lent = f"{worker.name} lends {format_bytes(worker.vram_bytes)}"
            console.print(f"[green]✓[/] {lent}, paid to {worker.payout_address}")
        while True:
            for name in nodes.revive():
                console.print(f"[yellow]{name} had ended and was started again[/]")
            joined = sum(nodes.said(worker.name, STARTED) for worker in workers)
            status.update(f"{joined} of {len(workers)} nodes joined to {address}; Ctrl-C leaves")
            time.sleep(_WATCH_S)
