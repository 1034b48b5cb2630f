"""A client that disconnects leaves nothing behind: no sequence, no KV block, no reservation."""

import asyncio
import random
import time

import httpx
import pytest

from tests.network.actors import actors_named, ask_inside
from tests.network.test_money import settled
from tests.network.user import User

pytestmark = pytest.mark.cluster

CONTENT = "Tell me how azu works."


def held(pipeline: object) -> tuple[int, int]:
    """Return, inside a Pipeline, the unfinished sequences and the number of used KV blocks."""
    engine = pipeline._engine
    return engine.num_sequences, engine._scheduler._config.num_blocks - engine.num_free_blocks


def wait_until_free(prefix: str) -> None:
    """Wait until the pipeline has no sequence and no used block."""
    deadline_s = time.monotonic() + 30
    (pipeline,) = actors_named(prefix)
    while (found := ask_inside(pipeline, held)) != (0, 0):
        assert time.monotonic() < deadline_s, found
        time.sleep(0.01)


async def dropped(client: httpx.AsyncClient, after_s: float, *, stream: bool) -> None:
    """Request a long answer and disconnect at a random moment."""
    body = {
        "model": "azu/tiny-dense",
        "messages": [{"role": "user", "content": CONTENT}],
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": stream,
    }

    async def read() -> None:
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            async for _ in reply.aiter_bytes():
                pass

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(), after_s)


def drop_many(user: User, count: int, seed: int) -> None:
    chance = random.Random(seed)

    async def all_of_them() -> None:
        headers = {"authorization": f"Bearer {user.api_key}"}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=user.url, headers=headers, timeout=60, limits=limits) as client:
            for start in range(0, count, 20):
                # Some disconnect before their prompt is accepted, some while it waits, most in the middle.
                moments = [chance.choice((0.005, 0.02, 0.1, 0.5)) * chance.random() for _ in range(20)]
                drops = [
                    dropped(client, moment, stream=chance.random() < 0.8)
                    for moment in moments[: count - start]
                ]
                await asyncio.gather(*drops)

    asyncio.run(all_of_them())


def check_nothing_is_left(user: User, count: int) -> None:
    settled(user)

    drop_many(user, count, seed=count)

    assert settled(user)[1] == 0
    wait_until_free("pipeline:azu-tiny-dense")
    jobs = user.http.get("/v1/jobs", params={"limit": 1000}).json()["data"]
    assert not [job for job in jobs if job["status"] in ("queued", "running")]
    recent = [job for job in jobs if job["status"] == "cancelled"][:count]
    for job in recent:
        receipt = user.http.get(f"/v1/receipts/{job['job_id']}").json()
        assert receipt["completion_tokens"] < 400, "it ran on without a reader"
    left = "no sequence, block or reservation left"
    print(f"\n{count} streams dropped, {len(recent)} of them once they were jobs: {left}")


def test_streams_dropped_at_random_points_leave_nothing(user: User) -> None:
    check_nothing_is_left(user, 20)


@pytest.mark.prove
def test_a_hundred_streams_dropped_at_random_points_leave_nothing(user: User) -> None:
    check_nothing_is_left(user, 100)


# A busy machine takes long to see the end of a connection: the answer may be whole by then.
@pytest.mark.prove
def test_a_reader_that_disconnects_frees_its_blocks(user: User) -> None:
    body = {
        "model": "azu/tiny-dense",
        "prompt": CONTENT,
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": True,
    }
    with user.http.stream("POST", "/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        for _ in range(6):
            next(lines)

    wait_until_free("pipeline:azu-tiny-dense")
    settled(user)
    job = user.http.get("/v1/jobs").json()["data"][0]
    assert job["status"] == "cancelled"
    receipt = user.http.get(f"/v1/receipts/{job['job_id']}").json()
    assert 0 < receipt["completion_tokens"] < 450
