"""Reads of Redis streams, typed as they come from a client that speaks `str`."""

from collections.abc import Mapping
from typing import Any, cast

from redis.asyncio import Redis

# Shorter than the connection's own timeout, so that a quiet stream is not taken for a lost connection.
BLOCK_MS = 5_000

Entry = tuple[str, dict[str, str]]


async def read_new(
    redis: Redis, positions: Mapping[str, str], *, count: int
) -> list[tuple[str, list[Entry]]]:
    """Return (stream, entries behind its position), waiting up to BLOCK_MS for a first one."""
    streams: dict[Any, Any] = dict(positions)
    return cast(list[tuple[str, list[Entry]]], await redis.xread(streams, count=count, block=BLOCK_MS))


async def read_group(
    redis: Redis, group: str, consumer: str, stream: str, *, count: int, block_ms: int
) -> list[Entry]:
    """Return entries that nobody in the group was given, waiting up to `block_ms` for a first one."""
    wait_ms = min(max(block_ms, 1), BLOCK_MS)  # Redis waits for ever at 0
    answer: Any = await redis.xreadgroup(group, consumer, {stream: ">"}, count, wait_ms)
    return [entry for _, entries in answer for entry in entries]


async def read_all(redis: Redis, stream: str, *, after: str | None = None) -> list[Entry]:
    """Return a stream's entries, or those behind the entry `after`."""
    return cast(list[Entry], await redis.xrange(stream, min="-" if after is None else f"({after}"))
