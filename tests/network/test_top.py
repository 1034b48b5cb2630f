"""`azu top` on a busy network: one sample for programs, a live view for people."""

import json
import os
import pty
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.network.user import User
from tests.prove.parts import azu

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

MODEL = "azu/tiny-dense"
_TIMEOUT_S = 60


def environment(user: User) -> dict[str, str]:
    return os.environ | {"AZU_URL": user.url, "AZU_API_KEY": user.api_key, "COLUMNS": "160"}


@contextmanager
def busy(user: User) -> Iterator[None]:
    """Keep the model generating."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            body = {"model": MODEL, "prompt": "Hello", "max_tokens": 100, "ignore_eos": True}
            user.http.post("/v1/completions", json=body).raise_for_status()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        stop.set()
        asking.join()


def test_one_sample_shows_the_speed_of_each_model(user: User) -> None:
    with busy(user):
        done = subprocess.run(
            azu("top", "--json", "--every", "3"),
            env=environment(user),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
    sample = json.loads(done.stdout)

    speed = sample["speeds"][MODEL]
    assert speed["tokens_per_s"] > 0
    assert speed["time_per_token_s"] > 0
    assert speed["hop_s"] > 0
    assert len(sample["nodes"]) == 3
    assert sample["jobs"]["running"] >= 1
    print(f"\n{speed}")


def test_the_live_view_ends_cleanly(user: User) -> None:
    ours, theirs = pty.openpty()
    with (
        busy(user),
        subprocess.Popen(
            azu("top", "--every", "0.5"),
            env=environment(user) | {"TERM": "xterm", "LINES": "40"},
            stdout=theirs,
            stderr=subprocess.PIPE,
        ) as process,
    ):
        os.close(theirs)
        shown = read_until(ours, MODEL)
        process.send_signal(signal.SIGINT)
        _, complained = process.communicate(timeout=_TIMEOUT_S)

    assert process.returncode == 0
    assert complained == b""
    for words in ("tokens/s", "ada", "ben", "cleo", "KV used"):
        assert words in shown


def read_until(terminal: int, words: str) -> str:
    """Return a terminal's output up to the end of the first view that contains a text."""
    shown, deadline = "", time.monotonic() + _TIMEOUT_S
    while words not in shown or "stalls" not in shown:
        assert time.monotonic() < deadline, shown
        shown += os.read(terminal, 65536).decode(errors="replace")
    return shown
