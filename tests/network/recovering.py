"""A network with spare capacity, streams whose tokens are timed, and ways to kill or freeze workers."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

import psutil
import pytest
import ray

from actors.placement import NAMESPACE
from azu.config import LocalWorker, NetworkFile, load_network
from azu.launch.local_network import DEMO, LocalNetwork, demo_network
from azu.protocol.node import NodeState
from tests.network.actors import actors_named, ask_inside, pid_of
from tests.network.conftest import paying_user
from tests.network.test_metrics import scrape
from tests.network.test_nodes import wait_for
from tests.network.user import User

MODELS = ("azu/tiny-dense", "azu/tiny-moe")
TIMEOUT_S = 120.0
_POLL_S = 0.005
_AT_REST_S = 0.5

_SHOWN: list[str] = []

Running = tuple[LocalNetwork, User]


def spared(*, budget_s: float = 120.0, **mebibytes: int) -> NetworkFile:
    """Return the demo's network with other workers, by name and what they lend.

    `budget_s` is how long a job waits for workers. A job whose client hangs up ends at once.
    """
    demo = load_network(DEMO)
    lenders = tuple(
        LocalWorker(name=name, vram=f"{mib}MiB", payout=f"0x{index:040x}")
        for index, (name, mib) in enumerate(mebibytes.items(), start=1)
    )
    requeue = demo.policy.requeue.model_copy(update={"budget_s": budget_s})
    limits = demo.policy.limits.model_copy(update={"repeat_within_s": 0})
    policy = demo.policy.model_copy(update={"requeue": requeue, "limits": limits})
    return demo.model_copy(update={"workers": lenders, "policy": policy})


@contextmanager
def network_of(
    home: Path, file: NetworkFile, *, ip: str | None = None
) -> Iterator[tuple[LocalNetwork, User]]:
    """Run a network and a user who has deposited 1 HYPE."""
    if ray.is_initialized():
        pytest.skip("a network runs in this process already: run this file by itself")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        # Root would have users of its own for it.
        environment.setenv("AZU_ONE_USER", "1")
        with demo_network(home, print, file, ip=ip) as network:
            if network.authority is not None:
                # The clients of these tests trust the system's authorities.
                environment.setenv("SSL_CERT_FILE", str(network.authority))
            yield network, paying_user(network, "recovering")
    print("\n".join(_SHOWN))


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt; the seed counts only above temperature 0."""

    model: str
    prompt: str
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0

    def body(self) -> dict[str, Any]:
        """Return the body of the request that streams the prompt's answer."""
        return {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": True,
        }


def four(model: str, max_tokens: int, *, words: int = 60) -> tuple[Asked, ...]:
    """Return two greedy and two sampled prompts of that many words, all different."""
    topics = ("Tell me how azu works", "What is the capital of France", "Who runs the layers", "Count to ten")
    return tuple(
        Asked(
            model,
            " ".join(f"{topic}?" for _ in range(words // len(topic.split()))),
            max_tokens,
            temperature=0.0 if index < 2 else 1.0,
            seed=11 + index,
        )
        for index, topic in enumerate(topics)
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """What has to be the same, however often workers die."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    charged_lamports: int


@dataclass(slots=True)
class Stream:
    """One request on its way; `afters` counts the tokens up to each piece, `times` says when it came."""

    asked: Asked
    pieces: list[str] = field(default_factory=list)
    afters: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    job_id: str = ""
    fault: str = ""
    ended: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens that have arrived."""
        return self.afters[-1] if self.afters else 0

    def longest_stall_s(self) -> float:
        """Return the longest time between two pieces."""
        return max((after - before for before, after in pairwise(self.times)), default=0.0)

    def read(self, user: User) -> None:
        """Send the request and read the stream to its end."""
        try:
            with user.http.stream("POST", "/v1/completions", json=self.asked.body()) as reply:
                if reply.is_error:
                    self.fault = f"{reply.status_code} {reply.read().decode()}"
                    return
                for line in reply.iter_lines():
                    self._heard(line)
        except Exception as error:
            self.fault = self.fault or f"{type(error).__name__}: {error}"
        finally:
            self.ended = True

    def _heard(self, line: str) -> None:
        if not line.startswith("data: {"):
            return
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            self.fault = str(chunk["error"])
            return
        self.job_id = chunk["azu"]["job_id"]
        if text := chunk["choices"][0]["text"]:
            self.times.append(time.monotonic())
            self.pieces.append(text)
            self.afters.append(chunk["azu"]["after"])

    def answer(self, user: User) -> Answer:
        """Return the answer; every token must have arrived once and in order."""
        assert not self.fault, self.fault
        assert all(before < after for before, after in pairwise(self.afters)), self.afters
        results = user.results(self.job_id)
        assert results["status"] == "done", results
        receipt = results["receipt"]
        assert isinstance(receipt, dict)
        paid = receipt["platform_lamports"] + sum(receipt["worker_lamports"].values())
        assert paid == receipt["charged_lamports"]
        text = "".join(self.pieces)
        assert text == results["text"], "the stream differs from the stored result"
        return Answer(
            text, tuple(results["token_ids"]), results["finish_reason"], receipt["charged_lamports"]
        )


class Streams:
    """Several requests at once, each read in a thread of its own."""

    def __init__(self, user: User, asked: Sequence[Asked]) -> None:
        self._user = user
        self.each = [Stream(one) for one in asked]
        self._threads = [Thread(target=one.read, args=(user,), daemon=True) for one in self.each]
        for thread in self._threads:
            thread.start()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition that has to hold before all streams have ended."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while not condition():
            assert not all(stream.ended for stream in self.each), [stream.fault for stream in self.each]
            assert time.monotonic() < deadline_s, [stream.num_tokens for stream in self.each]
            time.sleep(_POLL_S)

    def join(self) -> None:
        """Wait until all streams have ended."""
        deadline_s = time.monotonic() + TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        assert all(stream.ended for stream in self.each), [stream.num_tokens for stream in self.each]

    def answers(self) -> list[Answer]:
        """Wait until all streams have ended and return their answers."""
        self.join()
        return [stream.answer(self._user) for stream in self.each]

    def longest_stall_s(self) -> float:
        """Return the longest time between two pieces of any stream."""
        return max(stream.longest_stall_s() for stream in self.each)


def slug(model: str) -> str:
    """Return the part of an actor's name that names the model."""
    return model.replace("/", "-")


def pieces_of(model: str) -> list[str]:
    """Return the names of a model's stages and expert sets, in the order of their indices."""
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    pieces = [name.split(":") for name in names if name.startswith(("layer:", "expert:"))]
    own = [words for words in pieces if words[1] == slug(model)]
    return [":".join(words) for words in sorted(own, key=lambda words: (words[0], int(words[3])))]


def wait_for_pieces(model: str, count: int) -> list[str]:
    """Wait until a model has all its pieces again, and return their names."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(found := pieces_of(model)) != count:
        assert time.monotonic() < deadline_s, found
        time.sleep(0.05)
    return found


def is_prefilling(pipeline: object) -> bool:
    """Return, inside a Pipeline, whether a prompt runs that has no first token yet."""
    found = pipeline._engine._sequences.values()
    return any(one.num_scheduled and not one.num_generated for one in found)


def wait_until_prefilling(model: str, streams: Streams) -> None:
    """Wait for the first chunk of a prompt."""
    (pipeline,) = actors_named(f"pipeline:{slug(model)}:")
    streams.wait_until(lambda: ask_inside(pipeline, is_prefilling))


def node_pids(name: str) -> list[int]:
    """Return every process of a worker's Ray node: its raylet, known by its labels, and its children."""
    for raylet in raylets():
        if f'"{name}"' in " ".join(raylet.cmdline()):
            return [raylet.pid, *(child.pid for child in raylet.children(recursive=True))]
    raise AssertionError(f"{name} has no raylet")


def end_nodes(names: Collection[str]) -> None:
    """Kill workers' nodes, and wait until the network knows it."""
    for name in names:
        kill_all(node_pids(name))
        wait_for(
            lambda found, name=name: found.get(name) is None or found[name].state is NodeState.DEAD, TIMEOUT_S
        )


def raylets() -> list[psutil.Process]:
    """Return the raylets of the network that this process is connected to."""
    head = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "raylet" and head in " ".join(process.info["cmdline"] or ())
    ]


def piece_pids() -> set[int]:
    """Return the processes that hold pieces of models, or are about to."""
    found = set()
    for raylet in raylets():
        for child in raylet.children():
            with suppress(psutil.Error, IndexError):  # it ended
                if child.cmdline()[0].startswith(("ray::LayerActor", "ray::ExpertActor")):
                    found.add(child.pid)
    return found


def wait_for_waiting() -> None:
    """Wait until every node has an idle process that has imported what a piece needs."""
    deadline_s = time.monotonic() + TIMEOUT_S
    lenders = [raylet for raylet in raylets() if "--head" not in raylet.cmdline()]
    while not all(is_one_at_rest(raylet) for raylet in lenders):
        assert time.monotonic() < deadline_s, "a node has no idle process"


def is_one_at_rest(raylet: psutil.Process) -> bool:
    """Return whether one of a node's processes is idle and has used no CPU for half a second."""
    with suppress(psutil.Error, IndexError):
        idle = [child for child in raylet.children() if child.cmdline()[0].startswith("ray::IDLE")]
        before = [child.cpu_times().user for child in idle]
        time.sleep(_AT_REST_S)
        after = [child.cpu_times().user for child in idle]
        return any(later - earlier < 0.1 * _AT_REST_S for earlier, later in zip(before, after, strict=True))
    return False


def kill_and_kill_again(pid: int, next_pid: Callable[[set[int]], int]) -> None:
    """Kill a piece and wait until its replacement's process runs; then kill the process `next_pid` picks.

    `next_pid` gets the new processes.
    """
    before = piece_pids()
    kill_all([pid])
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (fresh := piece_pids() - before):
        assert time.monotonic() < deadline_s, "no process replaces it"
    kill_all([next_pid(fresh)])


def kill_all(pids: Sequence[int]) -> None:
    """Kill processes that the test's own network started."""
    signal_all(pids, signal.SIGKILL)


def signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to processes that the test's own network started."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def node_names(user: User, model: str) -> list[str]:
    """Return the names of the nodes that hold a piece of a model."""
    return sorted({piece["node"] for piece in topology(user, model)})


def topology(user: User, model: str) -> list[dict[str, Any]]:
    """Return the network's line for each of a model's stages, in order, and then for each expert set."""
    deployments = user.http.get("/v1/network").raise_for_status().json()["deployments"]
    (lines,) = [one["topology"] for one in deployments if one["model_id"] == model]
    return list(lines)


def shares(user: User, job_id: str) -> Counter[str]:
    """Return what each payout address, the "platform" and no one ("held") has of a job's charge."""
    receipt = user.results(job_id)["receipt"]
    assert isinstance(receipt, dict)
    paid = Counter(receipt["worker_lamports"])
    paid["platform"], paid["held"] = receipt["platform_lamports"], receipt["held_lamports"]
    assert paid.total() == receipt["charged_lamports"]
    return paid


def counted(network: LocalNetwork, metric: str, node: str) -> float:
    """Return a counter of a node."""
    return scrape(network).get((metric, frozenset({("node", node)})), 0.0)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition; `what` says what it means that it does not come to hold."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.2)


def wait_until_alive(network: LocalNetwork, user: User, names: Sequence[str]) -> None:
    """Restart workers that died until all of these nodes take new work."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        network.revive()
        nodes = user.http.get("/v1/network").raise_for_status().json()["nodes"]
        alive = {node["name"] for node in nodes if node["state"] == "alive"}
        if alive >= set(names):
            return
        assert time.monotonic() < deadline_s, nodes
        time.sleep(0.2)


def show_stalls(what: str, stalls_s: Sequence[float]) -> None:
    """Report the longest stalls of streams whose answers equal the undisturbed ones."""
    show(
        f"{what}: {len(stalls_s)} times, 4 streams each, identical; longest stall: median "
        f"{median(stalls_s):.2f} s, worst {max(stalls_s):.2f} s (load {os.getloadavg()[0]:.1f})"
    )


def show(line: str) -> None:
    """Add a line to the report, which pytest prints last, after Ray's output about killed workers."""
    print(line)
    _SHOWN.append(line)


def undisturbed(user: User, model: str, num_tokens: int) -> list[Answer]:
    """Return the four streams' answers when no worker is disturbed."""
    return Streams(user, four(model, num_tokens)).answers()


def disturbed(
    user: User, model: str, num_tokens: int, moment: str, disturb: Callable[[], object]
) -> tuple[list[Answer], float]:
    """Disturb workers at a moment of four streams; return their answers and the longest stall.

    Moments count the first stream's tokens.
    """
    streams = Streams(user, four(model, num_tokens))
    least = {"first token": 1, "middle": num_tokens // 2, "last token": num_tokens - 2}
    if moment == "prefill":
        wait_until_prefilling(model, streams)
    else:
        streams.wait_until(lambda: streams.each[0].num_tokens >= least[moment])
    disturb()
    return streams.answers(), streams.longest_stall_s()


def pids(names: Sequence[str]) -> list[int]:
    """Return the process ids of actors."""
    return [pid_of(ray.get_actor(name, namespace=NAMESPACE)) for name in names]
