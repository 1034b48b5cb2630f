"""What `azu join` does until it ends: its nodes run, are started again, and get new certificates."""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from azu.cli.output import console, done
from azu.errors import AzuError, ConfigurationError, Conflict, OtherVersion, Unauthenticated
from azu.units import format_bytes, hype_from_lamports

if TYPE_CHECKING:
    from azu.api.network import NetworkResponse, RestartResponse
    from azu.client import Client
    from azu.config import Settings
    from azu.launch.membership import AnyTicket, ClusterAccess, Membership, Ticket, TlsFiles
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
_SHOW_EVERY_S = 15.0


def place_of(ticket: "AnyTicket", ip: str | None, home: Path) -> str:
    """Return the address at which the network reaches this machine, by default the one on the way to it."""
    from azu.launch.membership import EnrolmentTicket
    from azu.launch.processes import address_towards

    if isinstance(ticket, EnrolmentTicket):
        # The certificate has to contain the address that Ray gives the node.
        return ip or address_towards(ticket.url)
    return on_the_heads_machine(ticket, ip, home)


def join_until_left(
    ticket: "AnyTicket",
    settings: "Settings",
    ip: str,
    name: str | None,
    workers_called: "Callable[[str], list[Worker]]",
    client: "Client | None",
    joined: Callable[[], None],
) -> None:
    """Lend until a signal to stop; the nodes begin anew each time that the network was started again.

    `workers_called` returns this machine's nodes under a name; `joined` is called once all have joined.
    """
    from azu.launch.membership import membership_of
    from azu.launch.processes import stop_signals_raised

    user = ray_user_of(settings)
    with own_name(name) as machine, stop_signals_raised():
        workers, home = workers_called(machine), settings.home
        membership = membership_of(ticket, home, name=machine, host=ip, money_home=settings.money_home)
        # The line is drawn on a terminal alone.
        shown = Shown(client if console.is_terminal else None, workers, joined)
        while True:
            lend(membership, workers, ip, home, user, shown)


class Shown:
    """What the network says of this machine's nodes, asked now and then; with a key also what they earned."""

    def __init__(self, client: "Client | None", workers: "list[Worker]", joined: Callable[[], None]) -> None:
        self._client = client
        self._node_ids: dict[str, str] = {}
        self._payout = workers[0].payout_address.lower()
        self._joined: Callable[[], None] | None = joined
        self._asked_s = float("-inf")
        self._text = ""

    def have_joined(self) -> None:
        """Tell it once that all nodes have joined."""
        if self._joined is not None:
            self._joined()
            self._joined = None

    def starts(self, name: str, node_id: str) -> None:
        """Tell it the id with which a node starts: other machines may have nodes of this name."""
        self._node_ids[name] = node_id

    def text(self, now_s: float) -> str:
        """Return one line; the clock is in seconds."""
        if self._client is None or not self._client.has_key or now_s - self._asked_s < _SHOW_EVERY_S:
            return self._text
        self._asked_s = now_s
        try:
            held = told(self._client.network(), {*self._node_ids.values()})
            earned = self._client.earnings()
        except AzuError as error:
            self._text = error.message
            return self._text
        if earned.address.lower() == self._payout:
            held += f"; {hype_from_lamports(earned.earned_lamports)} HYPE earned"
            held += f", {hype_from_lamports(earned.paid_lamports)} paid"
        self._text = held
        return held


def told(found: "NetworkResponse", node_ids: "set[str]") -> str:
    """Return what a network's nodes with these ids do."""
    nodes = [one for one in found.nodes if one.node_id in node_ids]
    paused = [f"{one.name} is paused: {one.why_paused}" for one in nodes if one.why_paused]
    layers = Counter[str]()
    for model in found.deployments:
        for piece in model.topology:
            if piece.node_id in node_ids:
                layers[model.model_id] += piece.layers[1] - piece.layers[0]
    held = [f"{count} layers of {model_id}" for model_id, count in sorted(layers.items())]
    return "; ".join([*paused, "holds " + (", ".join(held) or "nothing")])


@contextmanager
def own_name(given: str | None) -> Iterator[str]:
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


def on_the_heads_machine(ticket: "Ticket", ip: str | None, home: Path) -> str:
    """Return the address of a node without encryption; raises ConfigurationError on another machine."""
    from azu.client.machine import running_network
    from azu.launch.membership import DEAD_TICKET, LOOPBACK, head_answers

    if ip in (None, LOOPBACK) and head_answers(f"{LOOPBACK}:{ticket.port}"):
        return LOOPBACK
    here = running_network(home)
    if here is not None and here.network_id == ticket.network:
        raise ConfigurationError(DEAD_TICKET, param="ticket")
    raise ConfigurationError(
        "this network is not encrypted: its ticket is for the head's own machine, while it runs there; "
        "others join after `azu up --ip ADDRESS`",
        param="ticket",
    )


def ray_user_of(settings: "Settings") -> "UnixUser | None":
    """Return the user that runs the network's code on a machine of root; None for the one of this process."""
    from azu.launch.network_users import ray_user

    if os.geteuid() != 0 or settings.one_user:
        return None
    try:
        return ray_user(settings)
    except ConfigurationError as error:
        console.print(Text(f"The network runs its code here as root: {error.message}", "yellow"))
        return None


def lend(
    membership: "Membership",
    workers: "list[Worker]",
    ip: str,
    home: Path,
    user: "UnixUser | None",
    shown: Shown,
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
            shown.starts(worker.name, node_id)

        for worker in workers:
            enrols = partial(enrol, worker)
            nodes.start(host.worker(access.head, worker, enrols, membership.new_node_id))
        share = partial(_shared, access.tls, Path(folder) / "files", user)
        watch(nodes, workers, membership, access, share, shown)


def _shared(tls: "TlsFiles | None", folder: Path, user: "UnixUser | None") -> "TlsFiles | None":
    """Return the certificate's files where the user that runs Ray can read them."""
    from dataclasses import astuple

    from azu.launch.membership import TlsFiles
    from azu.launch.network_users import shared_file

    if tls is None or user is None:
        return tls
    return TlsFiles(*(shared_file(folder, path.name, path.read_text(), user) for path in astuple(tls)))


def watch(
    nodes: "ProcessGroup",
    workers: "list[Worker]",
    membership: "Membership",
    access: "ClusterAccess",
    share: Callable[[], object],
    shown: Shown,
) -> None:
    """Wait until all nodes have joined, then start again those that end or need a new certificate.

    `share` puts a new one where they read it. Returns when the network has another access; raises
    Unauthenticated when they may no longer join, OtherVersion when the network is of a later release.
    """
    from azu.launch.membership import DEAD_TICKET
    from azu.launch.ray_nodes import REFUSED, STARTED
    from azu.launch.renewal import Renewal

    def has_joined(worker: "Worker") -> bool:
        # Where the token is renewed, `_later` finds the new one.
        if access.life is None and nodes.has_printed(worker.name, REFUSED):
            raise Unauthenticated(DEAD_TICKET, code="ticket_ended")
        return nodes.has_printed(worker.name, STARTED)

    life, renewal, checked_s, said = access.life, None, time.monotonic(), set[str]()
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
        shown.have_joined()
        while True:
            revived = nodes.revive()
            for name in revived:
                console.print(Text(f"{name} had ended and was started again", "yellow"))
            if revived or time.monotonic() - checked_s > check_s:
                checked_s = time.monotonic()
                later = _later(membership, said)
                if later is not None and not access.is_of_same_run(later):
                    return
                if renewal is not None and later is not None and later.life is not None:
                    share()
                    renewal.take(later.life, datetime.now(UTC))
            if renewal is not None and (renewed := renewal.step(datetime.now(UTC))) is not None:
                console.print(Text(f"{renewed} was started again, with a new certificate", "dim"))
            joined = sum(map(has_joined, workers))
            parts = f"{joined} of {len(workers)} nodes joined to {access.head}", shown.text(time.monotonic())
            status.update(Text("; ".join(filter(None, (*parts, "Ctrl-C leaves")))))
            time.sleep(_WATCH_S)


def _later(membership: "Membership", said: set[str]) -> "ClusterAccess | None":
    """Return what joins the network now; None while it does not answer, for a reason that is told once."""
    try:
        later = membership.access()
    except (Unauthenticated, OtherVersion):
        raise
    except AzuError as error:
        if error.message not in said:
            said.add(error.message)
            console.print(Text(error.message, "yellow"))
        return None
    said.clear()
    return later


def _asked(membership: "Membership", name: str) -> "RestartResponse | None":
    """Return whether it is a node's turn to be started again; None where the network does not say so."""
    try:
        return membership.ask_restart(name)
    except AzuError as error:
        console.print(Text(error.message, "yellow"))
        return None
