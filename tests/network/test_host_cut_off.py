"""The link of one of three hosts goes down during streams and comes up again: every answer is the same."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from azu.launch.admin import admin_facts, new_ticket
from azu.launch.local_network import LocalNetwork
from tests.hosts.namespaces import Host, lan, why_not
from tests.network.recovering import (
    Streams,
    disturbed,
    four,
    network_of,
    node_names,
    show_stalls,
    spared,
    undisturbed,
    wait_until_alive,
)
from tests.network.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

MODELS = ("azu/tiny-dense", "azu/tiny-moe")
NUM_TOKENS = 60
DOWN_S = 30.0
NAMES = ("far-1", "far-2", "far-3", "far-4")
STOP_TIMEOUT_S = 30.0

Running = tuple[LocalNetwork, User, dict[str, Host]]


def link(host: Host, state: str) -> None:
    """Set a host's only link up or down."""
    subprocess.run(["ip", "-n", host.namespace, "link", "set", "eth0", state], check=True, timeout=20)


def joined(stack: ExitStack, host: Host, name: str, home: Path, ticket: str) -> None:
    """Have a host lend 8 MiB; the registry's files are hidden from it, as if it had its own disk."""
    options = ("--vram", "8MiB", "--payout", "0x" + "b0" * 20, "--name", name, "--ip", host.ip, "--cpu")
    join = (str(Path(sys.executable).with_name("azu")), "join", ticket, *options)
    hidden = 'mount -t tmpfs none "$0" && exec "$@"'
    process = subprocess.Popen(
        host.command("unshare", "-m", "sh", "-c", hidden, str(home / "registry"), *join),
        env=os.environ | {"AZU_HOME": str(home.parent / name)},
        start_new_session=True,
    )
    stack.callback(stop, process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_TIMEOUT_S)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A head on this machine that lends almost nothing, and workers on three hosts."""
    if (missing := why_not()) is not None:
        pytest.skip(missing)
    home = tmp_path_factory.mktemp("hosts") / "head"
    (home / "registry").mkdir(parents=True)
    with lan(len(NAMES)) as hosts, ExitStack() as stack:
        network, user = stack.enter_context(network_of(home, spared(near=1), ip=hosts.ip))
        by_name = dict(zip(NAMES, hosts.hosts, strict=True))
        for name, host in by_name.items():
            ticket = new_ticket(home, admin_facts(home), label=name, uses=1, host=host.ip, expires_in_s=3600)
            joined(stack, host, name, home, ticket.encode())
        wait_until_alive(network, user, NAMES)
        yield network, user, by_name


@pytest.mark.parametrize("model", MODELS)
def test_streams_go_on_when_a_host_is_cut_off_and_comes_back(running: Running, model: str) -> None:
    network, user, hosts = running
    expected = undisturbed(user, model, NUM_TOKENS)
    stalls_s = []
    for index in range(len(far_nodes(user, model))):
        name = far_nodes(user, model)[index]
        cut_s = 0.0

        def cut(host: Host = hosts[name]) -> None:
            nonlocal cut_s
            link(host, "down")
            cut_s = time.monotonic()

        answers, stall_s = disturbed(user, model, NUM_TOKENS, "middle", cut)
        print(f"{model}: host of {name} cut off: {stall_s:.2f} s")
        assert answers == expected, name
        time.sleep(max(0.0, cut_s + DOWN_S - time.monotonic()))
        again = Streams(user, four(model, NUM_TOKENS))
        link(hosts[name], "up")
        assert again.answers() == expected, "it came back and disturbed the others"
        stalls_s.append(stall_s)
        wait_until_alive(network, user, NAMES)
    show_stalls(f"{model}, a host cut off for {DOWN_S:.0f} s", stalls_s)


def far_nodes(user: User, model: str) -> list[str]:
    return [name for name in node_names(user, model) if name in NAMES]
