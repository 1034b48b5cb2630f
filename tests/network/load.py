"""Clients that send requests without pause while a test breaks something, and checks of every answer."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from azu.client import Client
from azu.errors import AzuError, Unavailable
from tests.network.test_money import settled
from tests.network.user import User

MAX_TOKENS = 60
_QUESTIONS = ("Tell me how azu works.", "What is the capital of France?", "Count to ten:", "One, two, three,")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with one right answer."""

    model: str
    text: str
    sampling: tuple[tuple[str, float | int], ...]

    def ask(self, client: Client) -> Iterator[str]:
        """Yield the answer's pieces."""
        return iter(
            client.stream(
                self.text, model=self.model, max_tokens=MAX_TOKENS, ignore_eos=True, **dict(self.sampling)
            )
        )


PROMPTS = tuple(
    Prompt(model, question, sampling)
    for model in ("azu/tiny-dense", "azu/tiny-moe")
    for question in _QUESTIONS
    for sampling in ((), (("temperature", 0.8), ("seed", 7)))
)


@dataclass(slots=True)
class Load:
    """What the clients received: the number of answers, the wrong ones, and the longest waits for a piece."""

    answers: int = 0
    wrong: list[tuple[Prompt, str]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    stalls_s: list[float] = field(default_factory=list)


def undisturbed(user: User) -> dict[Prompt, str]:
    """Return the right answer of every prompt."""
    client = Client(user.url, user.api_key)
    answers = {prompt: "".join(prompt.ask(client)) for prompt in PROMPTS}
    client.close()
    return answers


@contextmanager
def loaded(user: User, num_clients: int, right: dict[Prompt, str]) -> Iterator[Load]:
    """Have clients send requests during the block; when it ends, each has received its last answer."""
    load, over = Load(), threading.Event()
    threads = [
        threading.Thread(target=_send_requests, args=(user, number, right, load, over))
        for number in range(num_clients)
    ]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        over.set()
        for thread in threads:
            thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a client still waits for its answer"


def _send_requests(
    user: User, number: int, right: dict[Prompt, str], load: Load, over: threading.Event
) -> None:
    client = Client(user.url, user.api_key)
    while not over.is_set():
        prompt = PROMPTS[number % len(PROMPTS)]
        number += 1
        pieces, waited_s, last_s = [], [0.0], time.monotonic()
        try:
            for piece in prompt.ask(client):
                now_s = time.monotonic()
                if pieces:
                    waited_s.append(now_s - last_s)
                last_s = now_s
                pieces.append(piece)
        except (Unavailable, AzuError) as error:
            # The request was refused before it was accepted, so a client may send it again.
            load.refused[f"{'after pieces: ' if pieces else ''}{error.message}"[:90]] += 1
            time.sleep(0.2)
            continue
        load.answers += 1
        load.stalls_s.append(max(waited_s))
        if (answer := "".join(pieces)) != right[prompt]:
            load.wrong.append((prompt, answer))
    client.close()


@dataclass(frozen=True, slots=True)
class Books:
    """A user's money and jobs at one moment."""

    available: int
    job_ids: frozenset[str]

    @classmethod
    def of(cls, user: User) -> "Books":
        """Read the user's books once no lamport is reserved."""
        return cls(settled(user)[0], frozenset(job["job_id"] for job in _jobs(user)))


def check_books(user: User, before: Books, right: dict[Prompt, str]) -> int:
    """Check that every job since then is done, right and charged once; return how many there were."""
    after = Books.of(user)
    new = [job for job in _jobs(user) if job["job_id"] not in before.job_ids]
    assert [job for job in new if job["status"] != "done"] == []
    assert sum(job["charged_lamports"] for job in new) == before.available - after.available
    texts = set(right.values())
    for job in new:
        found = user.results(str(job["job_id"]))
        assert found["text"] in texts
        receipt = user.http.get(f"/v1/receipts/{job['job_id']}").raise_for_status().json()
        assert receipt["completion_tokens"] == MAX_TOKENS
        assert receipt["charged_lamports"] == 2 * receipt["token_layers"] == job["charged_lamports"]
        paid = receipt["platform_lamports"] + sum(receipt["worker_lamports"].values())
        assert paid == job["charged_lamports"]
        assert receipt["platform_lamports"] <= -(-paid // 5), (
            "the workers that ran it are paid, also those that died meanwhile"
        )
    return len(new)


def _jobs(user: User) -> list[dict[str, object]]:
    jobs: list[dict[str, object]] = user.http.get("/v1/jobs", params={"limit": 1000}).json()["data"]
    return jobs
