"""What a network's processes take is read from the system, azu's apart from Ray's."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from azu.launch.footprint import ProcessUse, uses_of

LISTENS = (
    "import socket, sys; own = socket.create_server(('127.0.0.1', 0)); "
    "print(own.getsockname()[1], flush=True); sys.stdin.read()"
)


@contextmanager
def running(*command: str) -> Iterator[int]:
    """Run a child that prints a number and ends with its input; yields the number."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, *command], text=True, **pipes) as child:
        assert child.stdout is not None
        yield int(child.stdout.readline())
        child.communicate()


def test_a_process_and_its_children_are_listed_with_their_ports() -> None:
    with running("-c", LISTENS, "azu.cli", "books") as port:
        own, *children = uses_of(psutil.Process())
        (found,) = (use for use in children if ("127.0.0.1", port) in use.listens)

    assert found.listens == (("127.0.0.1", port),)
    assert found.title == "azu books"
    assert found.rss_bytes > 0
    assert found.cpu_s > 0
    assert own.pid == psutil.Process().pid


@pytest.mark.parametrize(
    ("title", "is_of_ray"),
    [
        ("gcs_server", True),
        ("raylet", True),
        ("ray start", True),
        ("ray::IDLE", True),
        ("ray::ProxyActor", True),
        ("ray::ServeReplica:azu:ingress", False),
        ("ray::Scheduler.start", False),
        ("ray::NodeAgent", False),
        ("azu books", False),
        ("haproxy", False),
    ],
)
def test_what_is_of_ray_counts_apart(title: str, is_of_ray: bool) -> None:
    assert ProcessUse(1, title, 0.0, 1, ()).is_of_ray is is_of_ray
