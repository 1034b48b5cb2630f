"""A stage at a tenth of its speed, on a machine that does much else: it is waited for, never replaced.

AZU_TEST_SLOW_SECONDS makes it shorter.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

import pytest
import ray
from ray import cloudpickle

from actors.placement import CONTROL
from tests.network.actors import actors_named
from tests.network.recovering import (
    Asked,
    Running,
    Stream,
    four,
    network_of,
    pids,
    pieces_of,
    show,
    signal_all,
    slug,
    spared,
)

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

MODEL = "azu/tiny-dense"
SECONDS = float(os.environ.get("AZU_TEST_SLOW_SECONDS", "1200"))
NUM_LOOPS, NUM_CLIENTS = 8, 8
TOKENS = (12, 20)
# Of each so many seconds the stage runs a tenth.
CYCLE_S = 0.1
SAMPLE_S = 2.0
LAST_ANSWER_S = 600.0


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """Two nodes that the model fills: no other place is better for it."""
    with network_of(home, spared(ben=7, cleo=8)) as started:
        yield started


@dataclass(slots=True)
class Seen:
    """What the clients received, and what the network said meanwhile."""

    answers: int = 0
    faults: list[str] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)  # the longest of each answer
    longest_steps_s: dict[int, float] = field(default_factory=dict)  # of each stage
    # A model this small may stay "running": its steps vary by themselves as much as they are slowed down.
    states: set[str] = field(default_factory=set)


@contextmanager
def busy_loops() -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(NUM_LOOPS):
            loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(loop.wait)
            stack.callback(loop.kill)
        yield


@contextmanager
def at_a_tenth(pid: int) -> Iterator[None]:
    """Let a process run a tenth of the time."""
    over = Event()

    def cycle() -> None:
        while not over.wait(CYCLE_S / 10):
            signal_all([pid], signal.SIGSTOP)
            over.wait(CYCLE_S * 9 / 10)
            signal_all([pid], signal.SIGCONT)

    thread = Thread(target=cycle)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def recent_steps(stage: object) -> list[float]:
    """Return, inside a stage, how long its recent steps took."""
    return [seconds for times in list(stage._clock._times._recent.values()) for seconds in list(times)]


def look(running: Running, seen: Seen, stop: Event) -> None:
    """Note how long steps take and what the network says of the model, until the run is over."""
    cloudpickle.register_pickle_by_value(sys.modules[recent_steps.__module__])
    stages = actors_named(f"layer:{slug(MODEL)}:")
    while not stop.wait(SAMPLE_S):
        for index, stage in enumerate(stages):
            ask = stage.__ray_call__.options(concurrency_group=CONTROL)
            steps_s = ray.get(ask.remote(recent_steps), timeout=LAST_ANSWER_S)
            seen.longest_steps_s[index] = max([seen.longest_steps_s.get(index, 0.0), *steps_s])
        found = running[1].http.get("/v1/network").raise_for_status().json()
        seen.states |= {one["state"] for one in found["deployments"]}


def keep_asking(running: Running, asked: list[Asked], seen: Seen, until_s: float) -> None:
    """Send one prompt after another until the run is over."""
    number = 0
    while not number or time.monotonic() < until_s:
        stream = Stream(asked[number % len(asked)])
        stream.read(running[1])
        number += 1
        try:
            stream.answer(running[1])
        except Exception as error:
            seen.faults.append(f"{stream.job_id} after {stream.num_tokens} tokens: {error}")
        seen.answers += 1
        seen.waits_s.append(stream.longest_stall_s())


def recoveries(running: Running) -> int:
    deployments = running[1].http.get("/v1/network").raise_for_status().json()["deployments"]
    return sum(one["activity"]["recoveries"] for one in deployments)


def test_a_slow_stage_on_a_busy_machine_is_waited_for(running: Running) -> None:
    asked = [
        Asked(MODEL, one.prompt, tokens, one.temperature, one.seed)
        for one in four(MODEL, 0, words=40)
        for tokens in TOKENS
    ]
    calm = Seen()
    for one in asked:
        stream = Stream(one)
        stream.read(running[1])
        stream.answer(running[1])
        calm.waits_s.append(stream.longest_stall_s())
    names = pieces_of(MODEL)
    (slowed,) = pids([names[0]])

    seen, stop = Seen(), Event()
    looking = Thread(target=look, args=(running, seen, stop))
    until_s = time.monotonic() + SECONDS
    clients = [
        Thread(target=keep_asking, args=(running, asked[index:] + asked[:index], seen, until_s), daemon=True)
        for index in range(NUM_CLIENTS)
    ]
    with busy_loops(), at_a_tenth(slowed):
        looking.start()
        for client in clients:
            client.start()
        for client in clients:
            client.join(max(0.0, until_s - time.monotonic()) + LAST_ANSWER_S)
        stop.set()
        looking.join()
        load = os.getloadavg()[0]

    step_s = sum(seen.longest_steps_s.values())
    show(
        f"a stage at a tenth of its speed and {NUM_LOOPS} busy loops for {SECONDS:.0f} s (load {load:.1f}): "
        f"{seen.answers} answers, longest wait {max(seen.waits_s):.1f} s (undisturbed "
        f"{max(calm.waits_s):.2f} s), "
        f"longest steps {', '.join(f'{one:.1f}' for one in seen.longest_steps_s.values())} s, "
        f"states {', '.join(sorted(seen.states))}"
    )
    assert not any(client.is_alive() for client in clients), "a client still waits for its answer"
    assert seen.faults == []
    assert pieces_of(MODEL) == names, "a piece was replaced"
    assert recoveries(running) == 0
    assert max(seen.waits_s) <= 3 * len(names) * step_s
