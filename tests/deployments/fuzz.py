"""A mutation fuzzer for the ingress: good requests with one or more changes, many at once.

Each sender has its own money, so that a refused request that moved money is found at once.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote

from tests.mutations import mutated_bytes, mutated_value

MODEL = "azu/tiny-dense"
_QUIET_S = 60.0
_PROGRESS = 5_000
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request; its sender disconnects after `leaves` pieces of the answer, None for never."""

    method: str
    path: str
    query: str = ""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    leaves: int | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; its status is 0 if the sender disconnected before it began."""

    status: int
    body: bytes


class Target(Protocol):
    """An ingress."""

    async def send(self, call: Call) -> Reply:
        """Send a request and return its answer."""


@dataclass(slots=True)
class Sender:
    """A caller with a key; `money` reads the address's balances from the ledger."""

    address: str
    api_key: str
    money: Callable[[], Awaitable[tuple[int, ...]]]
    job_id: str = "job-000000000000000000000000"


@dataclass
class Found:
    """The counts and faults of a run."""

    statuses: Counter[int] = field(default_factory=Counter)
    by_path: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    faults: list[str] = field(default_factory=list)

    def summary(self, seconds: float) -> str:
        """Return the run as one line."""
        total = sum(self.statuses.values())
        counts = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()))
        return (
            f"{total} requests in {seconds:.0f} s ({total / seconds:.0f}/s); {self.refused} refused, "
            f"none of them moved money; by status {counts}; {len(self.faults)} faults"
        )


CHAT = {
    "model": MODEL,
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ["x"],
    "seed": 7,
    "stream": False,
    "stream_options": {"include_usage": True},
    "tools": [],
    "response_format": {"type": "text"},
    "logprobs": True,
    "top_logprobs": 2,
    "n": 2,
    "user": "a user",
}
SUBMIT = {"model_id": MODEL, "prompt": "Hi", "est_tokens": 2}
COMPLETION = {
    "model": MODEL,
    "prompt": "Hello",
    "max_tokens": 3,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {"5": -100.0},
    "min_tokens": 1,
    "ignore_eos": True,
    "stop_token_ids": [3],
    "logprobs": 1,
    "stream": True,
}


def good_calls(sender: Sender) -> list[tuple[str, str, str, Any]]:
    """Return method, path, query and body of a good request to every endpoint."""
    address, job_id = sender.address, sender.job_id
    return [
        ("POST", "/v1/chat/completions", "", CHAT),
        ("POST", "/v1/completions", "", COMPLETION),
        (
            "POST",
            "/submit",
            "",
            {"user_address": address, "model_id": MODEL, "prompt": "Hi", "est_tokens": 1},
        ),
        ("POST", "/v1/quote", "", {"model": MODEL, "tokens": 5, "max_tokens": 4}),
        ("POST", "/deposit", "", {"tx_sig": "0x" + "ab" * 32, "user_address": address}),
        ("POST", "/models/shard", "", {"model_id": MODEL}),
        ("POST", "/v1/auth/challenge", "", {"address": address, "key_sha256": "ab" * 32, "label": "x"}),
        ("POST", "/v1/auth/keys", "", {"nonce": "00", "signature": "0x" + "1b" * 65}),
        ("POST", "/v1/earnings/claim", "", {"signature": "0x" + "1b" * 65}),
        (
            "POST",
            "/v1/withdrawals",
            "",
            {"lamports": 10**7, "nonce": 1, "expires_at_ms": 2**42, "signature": "0x" + "1b" * 65},
        ),
        ("GET", "/v1/withdrawals/1", "", None),
        ("POST", f"/v1/jobs/{job_id}/dispute", "", {"signature": "0x" + "1b" * 65}),
        ("GET", f"/v1/jobs/{job_id}/dispute", "", None),
        ("GET", f"/results/{job_id}", "", None),
        ("GET", f"/v1/receipts/{job_id}", "", None),
        ("GET", f"/v1/jobs/{job_id}/stream", "after=0&chat=true", None),
        ("GET", "/v1/jobs", "limit=5", None),
        ("GET", "/v1/models", "", None),
        ("GET", f"/v1/models/{MODEL}", "", None),
        ("GET", "/models/status", f"model_id={MODEL}", None),
        ("GET", "/v1/balance", "", None),
        ("GET", "/v1/earnings", f"address={address}", None),
        ("GET", "/v1/auth/keys", "", None),
        ("GET", "/v1/platform", "", None),
        ("GET", "/v1/network", "", None),
        ("GET", "/health", "", None),
        ("GET", "/openapi.json", "", None),
        ("DELETE", "/v1/auth/keys/key-0000", "", None),
    ]


_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW")
_TYPES = (
    b"text/plain",
    b"",
    b"application/json; charset=utf-16",
    b"multipart/form-data; boundary=x",
    b"\xff",
)
_PARTS = (
    "..", "%2e%2e", "%00", "%ff", "😀", "//", "a" * 3000, "-1", "1e9", str(2**70), "azu:auth:key", "*", "?",
    "#", "%0d%0aX: y", "/etc/passwd", "\\..\\", "%2fetc%2fpasswd", "null", "true", "", "job-1 job-2", "{}",
    "'\"",
)  # fmt: skip


def mutated_call(sender: Sender, dice: random.Random, admin_key: str) -> Call:
    """Return a good request with changes; some requests stay good."""
    calls = good_calls(sender)
    # The endpoints that move money get half of all.
    method, path, query, body = dice.choice(calls[:3] if dice.random() < 0.5 else calls)
    bearer = admin_key if path == "/models/shard" and dice.random() < 0.5 else sender.api_key
    headers = {b"authorization": f"Bearer {bearer}".encode(), b"content-type": b"application/json"}
    content = b""
    what = dice.random()
    if body is not None and what < 0.75:
        for _ in range(dice.choice((0, 1, 1, 1, 2, 3))):
            body = mutated_value(body, dice)
    if body is not None:
        content = json.dumps(body).encode()
        if dice.random() < 0.1:
            content = mutated_bytes(content, dice)
    elif dice.random() < 0.5:
        path, query = _mutated_address(path, query, dice)
    if what > 0.95:
        headers = _mutated_headers(headers, dice)
    elif what > 0.92:
        path, query = _mutated_address(path, query, dice)
    elif what > 0.90:
        method = dice.choice(_METHODS)
    leaves = dice.randrange(4) if dice.random() < 0.01 else None
    return Call(method, path, query, tuple(headers.items()), content, leaves)


def _mutated_address(path: str, query: str, dice: random.Random) -> tuple[str, str]:
    match dice.randrange(4):
        case 0:
            parts = path.split("/")
            parts[dice.randrange(1, len(parts))] = dice.choice(_PARTS)
            return "/".join(parts), query
        case 1:
            return path + "/" + dice.choice(_PARTS), query
        case 2:
            name = query.partition("=")[0] or dice.choice(("limit", "after", "model_id", "address", "chat"))
            return path, f"{name}={quote(dice.choice(_PARTS), safe='%')}"
        case _:
            return path, query + "&" + dice.choice(_PARTS)


def _mutated_headers(headers: dict[bytes, bytes], dice: random.Random) -> dict[bytes, bytes]:
    bearer = headers[b"authorization"]
    match dice.randrange(5):
        case 0:
            return {name: value for name, value in headers.items() if name != b"authorization"}
        case 1:
            wrong = (
                b"",
                b"Bearer",
                b"Bearer \xff\xfe",
                b"Basic eA==",
                bearer[:-1],
                bearer * 300,
                b"bearer  x y",
            )
            return headers | {b"authorization": dice.choice(wrong)}
        case 2:
            return headers | {b"content-type": dice.choice(_TYPES)}
        case 3:
            return headers | {b"x-request-id": dice.choice((b"a" * 5000, b"\xff", b"a\tb", b"", b"%s%n"))}
        case _:
            return headers | {b"content-length": dice.choice((b"-1", b"99999999999", b"x", b"1", b"\xb2"))}


async def fuzz(target: Target, senders: list[Sender], *, requests: int, seed: int, admin_key: str) -> Found:
    """Send a number of requests, each sender one at a time, and return what was found."""
    found, started = Found(), time.monotonic()

    async def one(number: int, sender: Sender) -> None:
        dice = random.Random(f"{seed} {number}")
        for _ in range(number, requests, len(senders)):
            await _try(target, sender, mutated_call(sender, dice, admin_key), found)
            done = sum(found.statuses.values())
            if done % _PROGRESS == 0:
                print(found.summary(time.monotonic() - started), flush=True)

    await asyncio.gather(*(one(number, sender) for number, sender in enumerate(senders)))
    print(found.summary(time.monotonic() - started))
    return found


async def _try(target: Target, sender: Sender, call: Call, found: Found) -> None:
    before = await _quiet(sender)
    try:
        reply = await asyncio.wait_for(target.send(call), _QUIET_S)
    except Exception as error:
        reply = Reply(599, f"{type(error).__name__}: {error}".encode())
    found.statuses[reply.status] += 1
    found.by_path[f"{call.path} {reply.status}"] += 1
    if reply.status >= 500:
        _note(found, "broke", call, reply)
    elif reply.status >= 400:
        found.refused += 1
        if await sender.money() != before:
            _note(found, "moved money", call, reply)
        if call.method != "HEAD" and not _is_openais(reply.body):
            _note(found, "has not OpenAI's error shape", call, reply)
    elif reply.status == 200 and (job_id := _job_id(reply.body)):
        sender.job_id = job_id


async def _quiet(sender: Sender) -> tuple[int, ...]:
    """Wait until no money of a sender is reserved, and return its balances, the reserved one second."""
    deadline = time.monotonic() + _QUIET_S
    while (money := await sender.money())[1] and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return money


def _note(found: Found, what: str, call: Call, reply: Reply) -> None:
    if len(found.faults) < _SHOWN:
        print(f"{what}: {call} -> {reply.status} {reply.body[:500]!r}", flush=True)
    found.faults.append(what)


def _is_openais(body: bytes) -> bool:
    try:
        error = json.loads(body)["error"]
        return set(error) == {"message", "type", "param", "code"} and bool(error["message"])
    except (ValueError, KeyError, TypeError):
        return False


def _job_id(body: bytes) -> str | None:
    at = body.find(b'"job_id":')
    return body[at:].split(b'"')[3].decode() if at >= 0 else None
