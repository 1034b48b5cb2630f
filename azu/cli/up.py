"""`azu up`: a network on this machine that others can join."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from azu.cli.output import AsJson, console, show

if TYPE_CHECKING:
    from azu.config import LocalWorker
    from azu.launch.local_network import LocalNetwork


Workers = Annotated[int, typer.Option(min=0, max=64, help="Workers to start on this machine.")]
Vram = Annotated[str, typer.Option(help="What each of them lends, in whole MiB.")]
PayoutOption = Annotated[
    str | None, typer.Option(help="The address that is paid for them; not needed on a devnet.")
]
File = Annotated[Path | None, typer.Option(help="A network file; see configs/network.yaml.")]
Ip = Annotated[
    str | None, typer.Option(help="The address at which other machines reach this one, encrypted.")
]
TrustMembers = Annotated[
    bool,
    typer.Option("--trust-members", help="Make tickets although each member could take the money of all."),
]
Rotate = Annotated[
    bool, typer.Option("--rotate", help="Shut every other machine out, until it has a new ticket.")
]
NewToken = Annotated[
    bool, typer.Option("--new-token", help="Make a new token and admin key: old tickets do not join again.")
]
Dashboard = Annotated[
    bool | None, typer.Option(help="Ray's dashboard, at port 8265 where it is free; by default without --ip.")
]
Background = Annotated[bool, typer.Option("--background", help="Return once it is up.")]


def up(
    workers: Workers = 0,
    vram: Vram = "2GiB",
    payout: PayoutOption = None,
    network: File = None,
    ip: Ip = None,
    trust_members: TrustMembers = False,
    rotate: Rotate = False,
    new_token: NewToken = False,
    dashboard: Dashboard = None,
    background: Background = False,
    as_json: AsJson = False,
) -> None:
    """Run a network on this machine until Ctrl-C or `azu down`; prints its address, ticket and admin key."""
    from azu.cli.output import ProgressPrinter
    from azu.config import load_settings
    from azu.launch.http_port import http_port_held
    from azu.launch.local_network import local_network, with_http_host
    from azu.launch.network_process import home_locked, run_in_background, watch
    from azu.launch.processes import stop_signals_raised

    settings, file = load_settings(network)
    if background:
        at = with_http_host(settings, ip)
        with home_locked(at.home), http_port_held(at.http_host, at.http_port):
            pass  # what refuses the network is told at once, not by the process that starts in the background
        with ProgressPrinter(quiet=as_json).steps_of_another() as step:
            facts = run_in_background(settings.home, 4 * file.policy.timeouts.start_s, step=step)
        _print_facts(facts, as_json)
        return
    own = _workers(workers, vram, payout, play_money=settings.chain_url is None)
    file = file.model_copy(update={"workers": (*file.workers, *own)})
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals_raised())
        with ProgressPrinter(stderr=as_json).steps() as step:
            running = stack.enter_context(
                local_network(
                    settings, file, step,
                    ip=ip, dashboard=ip is None if dashboard is None else dashboard,
                    trust_members=trust_members, rotate=rotate,
                    new_token=new_token,
                )
            )  # fmt: skip
        _print_facts(_facts(running), as_json)
        watch(running.revive, stop)


def _workers(number: int, vram: str, payout: str | None, *, play_money: bool) -> "list[LocalWorker]":
    """Return workers of this machine: on its GPUs first, then on the CPU."""
    from pydantic import ValidationError

    from azu.config import LocalWorker
    from azu.config.settings import configuration_error
    from azu.errors import ConfigurationError
    from azu.launch.ray_nodes import cuda_devices

    if number and payout is None and not play_money:
        raise ConfigurationError("--payout has to name the address that is paid", param="payout")
    gpus = len(cuda_devices()) if number else 0
    try:
        return [
            LocalWorker(
                name=f"worker-{index}",
                vram=vram,
                payout=payout or f"0x{index + 1:040x}",
                device=f"cuda:{index}" if index < gpus else "cpu",
            )
            for index in range(number)
        ]
    except ValidationError as error:
        raise configuration_error(error) from error


def _facts(running: "LocalNetwork") -> dict[str, Any]:
    return {
        "url": running.url,
        "login": f"{running.login_url}#{running.network_id}",
        "chain_url": running.chain_url,
        "platform_address": running.platform_address,
        "network_id": running.network_id,
        "admin_key": running.admin_key,
        "dashboard_url": running.dashboard_url,
        "token_file": str(running.token_file),
        "authority": None if running.authority is None else str(running.authority),
        "ticket": None if running.ticket is None else running.ticket.encode(),
        "ticket_host": getattr(running.ticket, "host", None),
        "no_ticket": running.no_ticket or None,
        "why_one_user": running.why_one_user,
    }


def _print_facts(facts: dict[str, str | None], as_json: bool) -> None:
    show(facts, as_json, _panel)
    if not as_json:
        # On lines of their own: a command that a panel wraps cannot be copied.
        console.print(f"azu login {facts['login']}", soft_wrap=True)
        if facts["ticket"] is not None:
            console.print(f"azu join {facts['ticket']} --vram 8GiB --payout 0x...", soft_wrap=True)


def _listens(facts: dict[str, str | None]) -> str:
    if facts["authority"] is not None:
        return "to other machines, encrypted"
    return "to this machine alone; `azu up --ip ADDRESS` opens it to others, encrypted"


def _more_tickets(no_ticket: str | None) -> Text:
    if no_ticket is None:
        return Text("azu ticket new --host ADDRESS")
    return Text.assemble((f"none: {no_ticket}", "red"), "; see --trust-members")


def _panel(facts: dict[str, str | None]) -> Panel:
    grid = Table.grid(padding=(0, 2))
    for name in ("url", "chain_url", "platform_address", "network_id", "admin_key"):
        grid.add_row(name.replace("_", " "), facts[name])
    if facts["dashboard_url"] is not None:
        grid.add_row("Ray's dashboard", f"{facts['dashboard_url']}, with the token in {facts['token_file']}")
    grid.add_row("listens", _listens(facts))
    if facts["authority"] is not None:
        grid.add_row("encrypted", f"clients other than azu need AZU_TLS_CA={facts['authority']}")
    one = f"one for everything: {facts['why_one_user']}"
    grid.add_row("Unix users", one if facts["why_one_user"] else "money and Ray have one each")
    grid.add_row("to pay", "the first command below; its id shows that it is this network")
    if facts["ticket"] is not None:
        grid.add_row("to lend", f"the second command, on {facts['ticket_host'] or 'this machine alone'}")
    if facts["authority"] is not None:
        grid.add_row("tickets", _more_tickets(facts["no_ticket"]))
        grid.add_row("", Text("a machine that joins can run code here: admit people you trust", "dim"))
    return Panel(grid, title="azu is up; `azu down` stops it", title_align="left", expand=False)
