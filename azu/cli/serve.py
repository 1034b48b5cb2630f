"""`azu serve`: a network on a Ray cluster that azu does not start, such as one of `ray up`."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.panel import Panel
from rich.table import Table

from azu.cli.output import AsJson, show

if TYPE_CHECKING:
    from azu.config import NetworkFile, Settings


Address = Annotated[str | None, typer.Option(help='The head "host:port"; else RAY_ADDRESS or this machine.')]
File = Annotated[Path | None, typer.Option(help="A network file; see configs/network.yaml.")]
BooksOnly = Annotated[
    bool,
    typer.Option("--books", help="Only the processes beside Ray; then run `serve deploy`."),
]
PayoutOption = Annotated[
    str | None, typer.Option(help="The address that is paid for the cluster's nodes; else it is held.")
]
Background = Annotated[bool, typer.Option("--background", help="Return once it is up; `azu down` stops it.")]


def serve(
    address: Address = None,
    network: File = None,
    books: BooksOnly = False,
    payout: PayoutOption = None,
    background: Background = False,
    as_json: AsJson = False,
) -> None:
    """Run a network on this machine's Ray head until Ctrl-C, `azu down` or the end of the head."""
    from azu.addresses import parse_address
    from azu.cli.output import ProgressPrinter
    from azu.config import load_settings
    from azu.launch.network_process import run_in_background, watch
    from azu.launch.processes import stop_signals_raised

    settings, file = load_settings(network)
    paid = None if payout is None else parse_address(payout, param="payout")
    if background:
        with ProgressPrinter(quiet=as_json).steps_of_another() as step:
            facts = run_in_background(settings.home, 4 * file.policy.timeouts.start_s, step=step)
        show(facts, as_json, _panel)
        return
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals_raised())
        if books:
            running, facts = _run_sidecars(stack, settings, file, paid)
        else:
            from azu.launch.attached_network import attached_network

            with ProgressPrinter(stderr=as_json).steps() as step:
                head = address or os.environ.get("RAY_ADDRESS") or "auto"
                running = stack.enter_context(attached_network(settings, file, head, step, paid))
            names = ("url", "chain_url", "platform_address", "network_id", "admin_key", "head")
            facts = {name: getattr(running, name) for name in names}
        show(facts, as_json, _panel)
        watch(running.revive, stop)


def _run_sidecars(
    stack: ExitStack, settings: "Settings", file: "NetworkFile", payout: str | None
) -> tuple[Any, dict[str, str]]:
    """Run the processes beside Ray, and write the configuration files that Serve's replicas read."""
    from azu.files import write_private
    from azu.launch.kept_access import kept_access
    from azu.launch.serving import control_config, ingress_config
    from azu.launch.sidecars import sidecars_running

    sidecars = stack.enter_context(sidecars_running(settings, file.policy, payout))
    access = kept_access(settings)
    config = control_config(
        settings,
        file.policy,
        sidecars.chain,
        sidecars.redis,
        sidecars.books,
        access.http_port,
        access.admin_key,
    )
    folder = settings.home / "serve"
    write_private(folder / "control.json", config.to_json())
    write_private(folder / "ingress.json", ingress_config(config, sidecars.redis, sidecars.books).to_json())
    return sidecars, {
        "chain_url": sidecars.chain.url,
        "platform_address": sidecars.chain.platform_address,
        "network_id": config.network_id,
        "admin_key": access.admin_key,
        "folder": str(folder),
    }


def _panel(facts: dict[str, str]) -> Panel:
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(name.replace("_", " "), value)
    return Panel(grid, title="azu is up; `azu down` stops it", title_align="left", expand=False)
