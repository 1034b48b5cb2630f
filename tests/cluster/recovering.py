"""A network with room to spare, streams whose every token is timed, and ways to take their workers away."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import ray

from azu.cli.network.local_network import LocalNetwork, demo_network
from azu.config import LocalWorker
from tests.cluster.actors import actors_named, ask_inside
from tests.cluster.conftest import paying_user
from tests.cluster.user import User

MODELS = ("azu/tiny-dense", "azu/tiny-moe")
TIMEOUT_S = 120.0
_POLL_S = 0.005


def workers(**mebibytes: int) -> tuple[LocalWorker, ...]:
    """Return workers by name and what they lend."""
    return tuple(
        LocalWorker(name=name, vram=f"{mib}MiB", payout=f"0x{index:040x}")
        for index, (name, mib) in enumerate(mebibytes.items(), start=1)
    )


@contextmanager
def network_of(home: Path, lenders: Sequence[LocalWorker]) -> Iterator[tuple[LocalNetwork, User]]:
    """Run a network of such workers and a user who has deposited 1 HYPE."""
    if ray.is_initialized():
        pytest.skip("a network runs in this process already: run this file by itself")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        with demo_network(home, print, lenders) as network:
            yield network, paying_user(network, "recovering")


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt; the seed counts only above temperature 0."""

    model: str
    prompt: str
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0

    def body(self) -> dict[str, Any]:
        """Return the request that streams it to its last token."""
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
    """Return two greedy and two sampled prompts of so many words, none like another."""
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
    """What has to be the same however often its workers die."""

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
        """Ask, and read to the end."""
        try:
            with user.http.stream("POST", "/v1/completions", json=self.asked.body()) as reply:
                reply.raise_for_status()
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
        """Return what came; every token must have come once and in order."""
        assert not self.fault, self.fault
        assert all(before < after for before, after in pairwise(self.afters)), self.afters
        results = user.results(self.job_id)
        assert results["status"] == "done", results
        receipt = results["receipt"]
        assert isinstance(receipt, dict)
        paid = receipt["platform_lamports"] + sum(receipt["worker_lamports"].values())
        assert paid == receipt["charged_lamports"]
        text = "".join(self.pieces)
        assert text == results["text"], "the stream is not what was written down"
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
        """Wait for a moment that has to come before all streams have ended."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while not condition():
            assert not all(stream.ended for stream in self.each), [stream.fault for stream in self.each]
            assert time.monotonic() < deadline_s, [stream.num_tokens for stream in self.each]
            time.sleep(_POLL_S)

    def answers(self) -> list[Answer]:
        """Wait for all ends and return what came."""
        deadline_s = time.monotonic() + TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        assert all(stream.ended for stream in self.each), [stream.num_tokens for stream in self.each]
        return [stream.answer(self._user) for stream in self.each]

    def longest_stall_s(self) -> float:
        """Return the longest time that any of them waited between two pieces."""
        return max(stream.longest_stall_s() for stream in self.each)


def slug(model: str) -> str:
    """Return a model's part of its actors' names."""
    return model.replace("/", "-")


def pieces_of(model: str) -> list[str]:
    """Return the names of a model's stages and expert sets, in the order of their indices."""
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    pieces = [name.split(":") for name in names if name.startswith(("layer:", "expert:"))]
    own = [words for words in pieces if words[1] == slug(model)]
    return [":".join(words) for words in sorted(own, key=lambda words: (words[0], int(words[3])))]


def is_prefilling(pipeline: object) -> bool:
    """Runs inside a Pipeline: a prompt has begun to run, and none has its first token."""
    found = pipeline._engine._sequences.values()
    return any(one.num_scheduled for one in found) and not any(one.num_generated for one in found)


def wait_until_prefilling(model: str, streams: Streams) -> None:
    """Wait for the first chunk of a prompt."""
    (pipeline,) = actors_named(f"pipeline:{slug(model)}:")
    streams.wait_until(lambda: ask_inside(pipeline, is_prefilling))


def node_pids(network_home: Path, name: str) -> list[int]:
    """Return every process of a worker's Ray node: its raylet, known by its labels, and its children."""
    for process in psutil.process_iter(["name", "cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if process.info["name"] == "raylet" and str(network_home) in command and f'"{name}"' in command:
            return [process.pid, *(child.pid for child in process.children(recursive=True))]
    raise AssertionError(f"{name} has no raylet")


def kill_all(pids: Sequence[int]) -> None:
    """Kill processes that the test's own network started."""
    for pid in pids:
        with suppress(ProcessLookupError):  # its parent took it along
            os.kill(pid, signal.SIGKILL)
