"""Memory of every process, and Redis, are flat while thousands of short jobs come and go.

AZU_TEST_JOBS is how many (20,000).
"""

import asyncio
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from azu.clock import wall_clock_ms
from azu.config import load_network
from azu.jobs.redis import TOKENS_KEPT_S, RedisJobs
from azu.launch.local_network import DEMO, LocalNetwork, demo_network
from azu.money.ledger.journal import JOURNAL
from azu.redis_client import connect_redis
from azu.units import MIB
from tests.network.conftest import ledger_redis_url, paying_user
from tests.network.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

JOBS = int(os.environ.get("AZU_TEST_JOBS", "20000"))
AT_ONCE = 24
# What a process may grow by from the half to the whole: an allocator's pools, caches that fill up.
GROWTH, GROWTH_BYTES = 1.1, 16 * MIB
BYTES_PER_JOB = 600

Memory = dict[tuple[str, int], int]  # resident bytes by title and process id


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[LocalNetwork]:
    """The demo's network without limits on the number of requests."""
    file = load_network(DEMO)
    limits = file.policy.limits.model_copy(update={"requests_per_minute": 6_000_000, "request_burst": 10**6})
    policy = file.policy.model_copy(update={"limits": limits})
    with demo_network(home, print, file.model_copy(update={"policy": policy})) as network:
        yield network


def memory() -> Memory:
    """Return the resident bytes of every process of the network."""
    found: Memory = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, IndexError):
            words = process.cmdline()
            title = words[0] if words[0].startswith("ray::") else " ".join(words)
            found[_short(title), process.pid] = process.memory_info().rss
    return found


def _short(title: str) -> str:
    known = ("ray::", "gcs_server", "raylet", "valkey-server", "treasury", "signer", "devnet")
    name = next((word for word in known if word in title), "other")
    return title.split()[0] if name == "ray::" else name


async def send(client: httpx.AsyncClient, count: int) -> None:
    """Have `count` jobs answered, many at once."""
    left = iter(range(count))

    async def one_after_the_other() -> None:
        for number in left:
            body = {
                "model": "azu/tiny-dense", "prompt": f"Number {number}", "max_tokens": 1 + number % 4,
                "stream": number % 2 == 0,
            }  # fmt: skip
            # A busy machine may put one off: what it says is shown, and the job comes later.
            while (answer := await client.post("/v1/completions", json=body)).status_code in (429, 503):
                print(f"put off: {answer.text}")
                await asyncio.sleep(float(answer.headers.get("retry-after", "1")))
            answer.raise_for_status()

    await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))


async def kept_bytes(network: LocalNetwork) -> tuple[int, int]:
    """Let the day of every job pass; return Redis' bytes in the journal, and in everything else."""
    stores = connect_redis(network.redis_url), connect_redis(ledger_redis_url(network))
    await RedisJobs(stores[0]).archive(wall_clock_ms() + 1000 * TOKENS_KEPT_S, 0)
    sizes: dict[str, int] = {}
    for redis in stores:
        sizes |= {key: await redis.memory_usage(key) or 0 async for key in redis.scan_iter(count=1000)}
        await redis.aclose()
    journal = sizes.pop(JOURNAL)
    # What stands for an API key has a bound of its own, which a short run does not reach.
    return journal, sum(size for key, size in sizes.items() if not key.startswith("azu:auth:"))


async def measured(network: LocalNetwork, user: User) -> list[tuple[int, Memory, int]]:
    """Return the number of jobs, every process's memory and Redis' bytes at a quarter, half and the whole."""
    found, done = [], 0
    headers = {"authorization": f"Bearer {user.api_key}"}
    async with httpx.AsyncClient(base_url=user.url, headers=headers, timeout=180) as client:
        await send(client, 50)
        for wanted in (JOBS // 4, JOBS // 2, JOBS):
            await send(client, wanted - done)
            done = wanted
            now = memory()
            journal, rest = await kept_bytes(network)
            total = sum(now.values()) / MIB
            print(f"{done} jobs: {total:.0f} MiB in {len(now)} processes; Redis {rest:,} bytes + {journal:,}")
            found.append((done, now, rest))
    return found


def test_many_short_jobs_leave_nothing_behind(running: LocalNetwork) -> None:
    user = paying_user(running, "soak")

    quarter, half, whole = asyncio.run(measured(running, user))

    for key, resident in sorted(whole[1].items(), key=lambda one: -one[1]):
        before = [f"{at[1][key] / MIB:.0f}" if key in at[1] else "-" for at in (quarter, half)]
        print(f"{key[0]:40} {' -> '.join([*before, f'{resident / MIB:.0f}'])} MiB")
    # A process that waits for its first work is still importing what it will need; and what Redis holds, the
    # journal and the jobs of less than a day among it, is counted key by key below.
    grown = {
        key[0]: (half[1][key], resident)
        for key, resident in whole[1].items()
        if key in half[1]
        and key[0] not in ("ray::IDLE", "valkey-server")
        and resident > max(GROWTH * half[1][key], half[1][key] + GROWTH_BYTES)
    }
    assert grown == {}
    assert (whole[2] - half[2]) / (whole[0] - half[0]) <= BYTES_PER_JOB
