"""Calls of a Redis that is away, whose callers wait without taking time."""

import asyncio

import pytest

from azu.errors import Unavailable


def away_for(calls: int, owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Have the next calls of a method find Redis away; return the pauses that are made from now on."""
    original, sleep, left, pauses_s = getattr(owner, name), asyncio.sleep, [None] * calls, list[float]()

    async def call(*arguments: object, **options: object) -> object:
        if left:
            left.pop()
            raise Unavailable("Redis did not answer")
        return await original(*arguments, **options)

    async def pause(seconds: float) -> None:
        pauses_s.append(seconds)
        await sleep(0)

    monkeypatch.setattr(owner, name, call)
    monkeypatch.setattr(asyncio, "sleep", pause)
    return pauses_s
