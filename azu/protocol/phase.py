"""Where a job stands that has not ended, as people are told it."""

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

from azu.units import format_bytes

PhaseName = Literal["queued", "describing", "fetching", "loading", "reading", "answering", "recovering"]


@dataclass(frozen=True, slots=True)
class JobPhase:
    """A phase, a sentence about it, and what is counted in it; None where nothing is.

    queued: `total` jobs come before it. fetching: shards on their nodes. loading, recovering: pieces that are
    up. reading: prompt tokens. answering: completion tokens, and the most that may come.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: PhaseName
    text: str
    done: int | None = None
    total: int | None = None
    bytes_done: int | None = None
    bytes_total: int | None = None


def queued(ahead: int) -> JobPhase:
    """Return the phase of a job that waits for room in its model's KV cache behind some others."""
    others = f" behind {ahead:,} other{'s' if ahead > 1 else ''}" if ahead else ""
    return JobPhase("queued", f"Waiting for room in the KV cache{others}.", total=ahead)


def fetching(text: str, bytes_done: int, bytes_total: int) -> JobPhase:
    """Return the phase of a job whose model's files are made ready on the head."""
    sizes = f"{format_bytes(bytes_done)} of {format_bytes(bytes_total)}"
    return JobPhase("fetching", f"{text}: {sizes}.", bytes_done=bytes_done, bytes_total=bytes_total)


def reading(done: int | None, total: int) -> JobPhase:
    """Return the phase of a job whose prompt is computed."""
    count = f"{total:,} tokens" if done is None else f"{done:,} of {total:,} tokens"
    return JobPhase("reading", f"Reading the prompt: {count}.", done=done, total=total)


def answering(done: int, total: int) -> JobPhase:
    """Return the phase of a job with completion tokens."""
    return JobPhase("answering", f"Answering: {done:,} of at most {total:,} tokens.", done=done, total=total)
