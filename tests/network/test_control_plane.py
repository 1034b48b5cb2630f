"""Each process of the control plane restarts from Redis: no job is lost, none is charged twice."""

import os
import signal
import statistics
import time
from collections.abc import Callable

import psutil
import pytest
import ray

from actors import control_plane
from actors.links import REGISTRY, find
from actors.placement import SCHEDULER
from azu.launch.local_network import LocalNetwork
from tests.network.actors import actors_named, pid_of
from tests.network.conftest import paying_user
from tests.network.load import Books, Load, check_books, loaded, undisturbed

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

KILLS = 5
CLIENTS = 4


def layer_pids() -> dict[str, int]:
    """Return the process of every piece by its actor's name."""
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    pieces = sorted(name for name in names if name.startswith(("layer:", "expert:")))
    return {name: pid_of(actors_named(name)[0]) for name in pieces}


def command_line(process: psutil.Process) -> list[str]:
    """Return a process's command line, empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def process_titled(beginning: str) -> int | None:
    """Return this network's process whose title has this prefix, None if there is none."""
    below = psutil.Process().children(recursive=True)
    found = [process.pid for process in below if (command_line(process) or [""])[0].startswith(beginning)]
    return found[0] if len(found) == 1 else None


def sidecar_pid(command: str) -> int | None:
    """Return the process of one of azu's commands, None while it waits for its restart."""
    children = psutil.Process().children()
    found = [child.pid for child in children if command_line(child)[-1:] == [command]]
    return found[0] if found else None


VICTIMS: dict[str, Callable[[], int | None]] = {
    "scheduler": lambda: pid_of(find(SCHEDULER)),
    "registry": lambda: pid_of(find(REGISTRY)),
    "pipeline of the dense model": lambda: pid_of(actors_named("pipeline:azu-tiny-dense")[0]),
    "pipeline of the MoE model": lambda: pid_of(actors_named("pipeline:azu-tiny-moe")[0]),
    "ingress": lambda: process_titled("ray::ServeReplica"),
    "Serve's proxy": lambda: process_titled("ray::ProxyActor"),
    "Serve's controller": lambda: process_titled("ray::ServeController"),
    "treasury": lambda: sidecar_pid("treasury"),
    "signer": lambda: sidecar_pid("signer"),
}


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_part_of_the_control_plane_loses_no_job_and_charges_none_twice(
    network: LocalNetwork, victim: str
) -> None:
    user = paying_user(network, victim)
    right = undisturbed(user)
    before, pieces = Books.of(user), layer_pids()

    with loaded(user, CLIENTS, right) as load:
        for _ in range(KILLS):
            go_on_for(network, load, answers=6)
            os.kill(back(network, VICTIMS[victim]), signal.SIGKILL)
        go_on_for(network, load, answers=10)

    assert load.wrong == []
    jobs = check_books(user, before, right)
    assert layer_pids() == pieces, "no process that holds weights restarted"
    print(
        f"{victim}: {KILLS} kills, {jobs} jobs, all done, right and charged once; longest stall "
        f"{max(load.stalls_s):.1f} s, median {statistics.median(load.stalls_s):.2f} s; "
        f"asked again: {dict(load.refused) or 'never'}"
    )


def back(network: LocalNetwork, victim: Callable[[], int | None]) -> int:
    """Wait until the killed process has been restarted; return its process id."""
    deadline = time.monotonic() + 90
    while (pid := victim()) is None:
        assert time.monotonic() < deadline, "it was not restarted"
        network.revive()
        time.sleep(0.2)
    return pid


def go_on_for(network: LocalNetwork, load: Load, *, answers: int) -> None:
    """Wait until that many more answers have arrived."""
    wanted = load.answers + answers
    deadline = time.monotonic() + 90
    while load.answers < wanted:
        assert time.monotonic() < deadline, (load.answers, wanted, load.refused)
        network.revive()
        time.sleep(0.2)


@pytest.mark.parametrize("name", [REGISTRY, SCHEDULER])
def test_a_process_of_the_control_plane_that_hangs_is_replaced_and_one_that_only_starts_is_not(
    network: LocalNetwork, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(control_plane, "_SILENCE_S", 2.0)
    user = paying_user(network, f"hangs-{name}")
    deadline_s = time.monotonic() + 120
    network.revive()
    while control_plane._questions[name].until_s - time.monotonic() > 2.0:
        assert time.monotonic() < deadline_s, "it does not answer"
        network.revive()  # it has not answered before
        time.sleep(0.1)
    os.kill(pid_of(find(name)), signal.SIGSTOP)
    revived: list[str] = []
    while not revived:
        assert time.monotonic() < deadline_s, "it was not noticed"
        revived = network.revive()
        time.sleep(0.1)
    assert revived == [name]
    body = {"model": "azu/tiny-dense", "prompt": "Hello", "max_tokens": 4}
    while not user.http.post("/v1/completions", json=body).is_success:
        assert network.revive() == [], "what starts is not replaced"
        assert time.monotonic() < deadline_s, "the network does not serve again"
