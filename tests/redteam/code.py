"""Code that a hostile member sends into processes of the head: it runs as their user, with all they have.

Nothing here imports azu's tests: Ray carries the functions as they are.
"""

import asyncio
import gc
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

_KEY = re.compile(rb"(?:0x)?([0-9a-fA-F]{64})(?![0-9a-fA-F])")
_MOST_BYTES = 1024 * 1024
_MOST_FILES = 5_000


def urls_in_memory(_: object) -> list[str]:
    """Return the URLs with credentials in this process's configuration."""
    found = set()
    for thing in _things("ControlConfig"):
        values = (getattr(thing, name) for name in type(thing).__slots__)
        found |= {value for value in values if isinstance(value, str) and "://" in value}
    return sorted(found)


def _things(kind: str) -> list[Any]:
    """Return the objects of a class in this process's memory."""
    # Ray Serve takes what a replica began with out of the garbage collector's sight.
    gc.unfreeze()
    return [thing for thing in gc.get_objects() if type(thing).__name__ == kind]


def identity(_: object) -> dict[str, Any]:
    """Return as what this process runs."""
    return {"uid": os.getuid(), "pid": os.getpid(), "groups": os.getgroups()}


def keys_within_reach(_: object, folders: Iterable[str]) -> dict[str, Any]:
    """Look for private keys in files, environments, core dumps and memory that this process can read.

    Returns the SHA-256 of each text that could be a key, by where it was, and the processes of other users
    whose memory could be opened.
    """
    hashes: dict[str, list[str]] = {}

    def note(where: str, content: bytes) -> None:
        for key in set(_KEY.findall(content)):
            hashes.setdefault(hashlib.sha256(key.lower()).hexdigest(), []).append(where)

    files = (Path(root) / name for folder in folders for root, _, names in os.walk(folder) for name in names)
    for path in islice(files, _MOST_FILES):
        try:
            with path.open("rb") as file:
                note(str(path), file.read(_MOST_BYTES))
        except OSError:
            continue
    memories = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        for name in ("environ", "cmdline"):
            try:
                note(str(process / name), (process / name).read_bytes())
            except OSError:
                continue
        try:
            is_other = process.stat().st_uid != os.getuid()
            with open(process / "mem", "rb"):
                memories += [int(process.name)] if is_other else []
        except OSError:
            continue
    return {"hashes": hashes, "memories": memories}


def traced(_: object, pids: Iterable[int]) -> list[int]:
    """Return the processes that this one could attach to as a debugger."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    attach, detach = 16, 17
    done = []
    for pid in pids:
        if libc.ptrace(attach, pid, None, None) == 0:
            os.waitpid(pid, 0)
            libc.ptrace(detach, pid, None, None)
            done.append(pid)
    return done


def readable(_: object, paths: Iterable[str]) -> list[str]:
    """Return the paths that this process can read or list."""
    return [path for path in paths if os.access(path, os.R_OK)]


def writable(_: object, paths: Iterable[str]) -> list[str]:
    """Return the paths that this process can change, or in which it can make a file."""
    return [path for path in paths if os.access(path, os.W_OK)]


def redis_answers(_: object, ports: Iterable[int], logins: Iterable[tuple[str, str]]) -> list[list[Any]]:
    """Return (port, user, an answer) for each login and command that a Redis at one of the ports accepts.

    The commands are those that read or change what the ledger keeps.
    """
    commands = (
        ("KEYS", "*"), ("GET", "azu:ledger:head"), ("XRANGE", "azu:ledger:journal", "-", "+", "COUNT", "1"),
        ("HGETALL", "azu:ledger:balances"), ("HSET", "azu:ledger:balances", "user:x:available", "1"),
        ("EVAL", "return redis.call('SET', KEYS[1], '1')", "1", "azu:ledger:head"), ("CONFIG", "GET", "dir"),
    )  # fmt: skip
    accepted = []
    for port in ports:
        for user, password in [("", ""), *logins]:
            for command in commands:
                login = (("AUTH", user, password),) if password else ()
                try:
                    answer = _asked(port, *login, command)
                except OSError:
                    break
                if answer and not answer.startswith((b"-", b"HTTP")):
                    accepted.append([port, user, command[0], answer[:200].decode(errors="replace")])
    return accepted


def _asked(port: int, *commands: tuple[str, ...]) -> bytes:
    """Send commands to a Redis, and return its answer to the last."""
    with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
        for command in commands:
            words = "".join(f"${len(word.encode())}\r\n{word}\r\n" for word in command)
            connection.sendall(f"*{len(command)}\r\n{words}".encode())
            answer = connection.recv(65536)
            if answer.startswith(b"-"):
                return answer
    return answer


def books_answer(_: object, url: str, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Make any call of the books with the secret of a URL, and return the answer or the error."""
    from urllib.parse import urlsplit

    from azu.errors import AzuError
    from azu.money import wire

    async def ask() -> dict[str, Any]:
        connected = await wire._open(urlsplit(url))
        try:
            sent = connected.ask(verb, json.dumps(arguments).encode())
            kind, content = await asyncio.wait_for(sent, 10)
        finally:
            connected.close()
        return {"answer": None, "refusal": None} | {kind.replace("error", "refusal"): json.loads(content)}

    try:
        # An actor may have an event loop in this thread.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, ask()).result()
    except (AzuError, OSError) as error:
        return {"answer": None, "refusal": [type(error).__name__, str(error)]}


def keep_keys(_: object) -> None:
    """Have this ingress keep each API key that comes with a request."""
    (services,) = _things("Services")
    books, honest = services.books, services.books.key
    books.kept = set()

    async def key(bearer: str) -> Any:
        books.kept.add(bearer)
        return await honest(bearer)

    books.key = key


def kept_keys(_: object) -> list[str]:
    """Return the API keys that came since `keep_keys`."""
    (services,) = _things("Services")
    return sorted(services.books.kept)


def show_platform(_: object, address: str) -> str:
    """Have this ingress show an address as the platform's; return the one that it showed before."""
    from dataclasses import replace

    (services,) = _things("Services")
    before: str = services.config.platform_address
    services.config = replace(services.config, platform_address=address)
    return before


def lie(piece: Any, what: str) -> None:
    """Have a stage or an expert set, from inside, say once that more was done than was."""
    from collections import Counter
    from dataclasses import replace

    from azu.protocol.step import ExpertWork, SampledToken, SequenceFault, StepResult

    runner, steps = piece._runner, iter(range(10**9))
    honest, layers = runner.run, range(6)

    def all_mine(work: Any) -> Any:
        """Return the same choices, all of them as the own stage's work."""
        totals: dict[int, Counter[int]] = {}
        for one in work:
            totals.setdefault(one.layer, Counter()).update(one.choices)
        return tuple(ExpertWork(layer, None, dict(total)) for layer, total in totals.items())

    def changed(said: Any) -> Any:
        ids = [one.sequence_id for one in getattr(said, "slices", getattr(said, "tokens", ()))]
        match what:
            case "more tokens" if isinstance(said, StepResult):
                return replace(said, tokens=(*said.tokens, SampledToken(ids[0], 5)))
            case "inflated work":
                more = tuple(
                    replace(one, choices=dict.fromkeys(one.choices, 10**6)) for one in said.expert_work
                )
                return replace(said, expert_work=more or (ExpertWork(2, None, dict.fromkeys(ids, 10**6)),))
            case "all work is mine":
                return replace(said, expert_work=all_mine(said.expert_work))
            case "work in a layer of others":
                more = tuple(ExpertWork(layer, None, dict.fromkeys(ids, 2)) for layer in layers)
                return replace(said, expert_work=(*said.expert_work, *more))
            case "an unknown node":
                fault = SequenceFault(ids[0], "internal_error", "no", "f" * 56)
                return replace(said, faults=(*said.faults, fault))
        return said

    def lying(batch: Any, frame: Any) -> Any:
        output = honest(batch, frame)
        said = output if isinstance(output, StepResult) else output.batch
        if not (said.tokens if isinstance(said, StepResult) else said.slices) or next(steps) != 3:
            return output
        return changed(said) if output is said else replace(output, batch=changed(said))

    if hasattr(piece, "step"):
        runner.run = lying
        return
    honest_received = runner.received.of

    def received(epoch: int, asked: Any) -> Any:
        got = honest_received(epoch, asked)
        factor = 10**6 if what == "inflated work" else 1
        return got and {step: {layer: factor * n for layer, n in of.items()} for step, of in got.items()}

    runner.received.of = received
