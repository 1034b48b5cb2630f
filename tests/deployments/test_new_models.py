"""Models that the network does not have cost their asker a fee, and never fill the disk."""

import asyncio
import os
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from azu.models.room import ModelRoom
from azu.redis_client import connect_redis
from azu.units import GIB, MIB
from tests.deployments.local import LocalIngress, local_ingress, unhurried
from tests.models.questions import built_in_folder

LAMPORTS_PER_GIB = 1_000_000
# So much of the models may lie on the disk.
DISK = 64 * MIB
FREE = 8 * MIB


def make_models(root: Path, count: int) -> list[str]:
    """Make folders of the same small model; they share their files."""
    source = built_in_folder("azu/tiny-dense")
    for number in range(count):
        shutil.copytree(source, root / f"model-{number}", copy_function=os.link)
    return [str(root / f"model-{number}") for number in range(count)]


def on_disk(root: Path) -> int:
    total = 0
    for path in root.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


async def ask(ingress: LocalIngress, key: str, model: str) -> str:
    body = {"model": model, "prompt": "Hello", "max_tokens": 1}
    async with ingress.client(key) as client:
        reply = await client.post("/v1/completions", json=body)
    return "answered" if reply.status_code == 200 else str(reply.json()["error"]["code"])


def play(redis_url: str, tmp_path: Path, count: int) -> None:
    models = make_models(tmp_path / "models", count + 1)
    fee = -(-on_disk(Path(models[0])) * LAMPORTS_PER_GIB // GIB)

    async def scenario() -> None:
        running = local_ingress(
            redis_url, tmp_path / "home", unhurried(), (tmp_path / "models",),
            fetch_lamports_per_gib=LAMPORTS_PER_GIB,
        )  # fmt: skip
        async with running as ingress:
            ingress.cut_first()
            registry = ingress.app.state.services.registry_here._models
            root = tmp_path / "home" / "registry"
            registry._room = replace(ModelRoom(root, FREE), disk_free=lambda folder: DISK - on_disk(folder))
            (_, free), (_, poor), (rich_address, rich) = [
                await ingress.user(lamports) for lamports in (0, 3 * fee - 1, 100_000_000)
            ]
            _, other = await ingress.user()
            theirs = models.pop()
            assert await ask(ingress, other, theirs) == "answered"
            assert not Counter([await ask(ingress, free, model) for model in models]) - Counter(
                {"insufficient_balance": count}
            )
            async with ingress.client(free) as client:
                refused = (await client.get(f"/v1/models/{models[0]}")).json()["error"]
            assert "is new here, and a fee for its 3.7 MiB" in refused["message"]
            assert len(list(root.glob("*/model-id"))) == 1, "nothing was described for the free key"
            described = [await describe(ingress, poor, model) for model in models]
            assert described.count(200) == 2
            assert set(described) == {200, 402}
            before, most = psutil.Process().memory_info().rss, 0
            for number, model in enumerate(models):
                assert await ask(ingress, rich, model) == "answered", number
                most = max(most, on_disk(root))
                if number % 3 == 0:
                    assert await ask(ingress, other, theirs) == "answered"
            grown = psutil.Process().memory_info().rss - before
            available = {one.model_id for one in registry.available()}
            assert most <= DISK - FREE
            assert theirs in available
            _, reserved, _, _ = await ingress.money(rich_address)
            assert reserved == 0, "each fee went back with the first job"
            print(
                f"{count} models: at most {most / MIB:.0f} of {DISK / MIB:.0f} MiB, {len(available)} kept, "
            )
            print(f"memory grew by {grown / MIB:.0f} MiB; a fee is {fee} lamports")
            assert grown < 512 * MIB

    asyncio.run(asyncio.wait_for(scenario(), 400))


async def describe(ingress: LocalIngress, key: str, model: str) -> int:
    async with ingress.client(key) as client:
        return (await client.get(f"/v1/models/{model}")).status_code


def test_new_models_cost_a_fee_and_leave_the_disk_before_it_is_full(redis_url: str, tmp_path: Path) -> None:
    play(redis_url, tmp_path, 4)


def test_a_fee_is_set_aside_for_a_model_that_is_asked_for_and_can_be_had(
    redis_url: str, tmp_path: Path
) -> None:
    model, broken = make_models(tmp_path / "models", 2)
    (Path(broken) / "config.json").unlink()
    (Path(broken) / "config.json").write_text("{}")

    async def scenario() -> None:
        running = local_ingress(
            redis_url, tmp_path / "home", unhurried(), (tmp_path / "models",),
            fetch_lamports_per_gib=LAMPORTS_PER_GIB,
        )  # fmt: skip
        async with running as ingress:
            address, key = await ingress.user()
            redis = connect_redis(redis_url)
            await redis.set("azu:jobs:draining", 9)
            assert (await describe(ingress, key, model), await reserved(ingress, address)) == (503, 0)
            await redis.delete("azu:jobs:draining")
            await redis.aclose()
            too_long = {"model": model, "prompt": "a", "max_tokens": 10**6}
            async with ingress.client(key) as client:
                refused = [
                    await client.post(path, json=too_long) for path in ("/v1/completions", "/v1/quote")
                ]
                submitted = {"user_address": address, "model_id": model, "prompt": "a", "est_tokens": 10**6}
                refused.append(await client.post("/submit", json=submitted))
                long_prompt = {"model": model, "prompt": [1] * 40_000, "max_tokens": 1}
                refused.append(await client.post("/v1/completions", json=long_prompt))
                quoted = {"model": model, "tokens": 40_000}
                refused.append(await client.post("/v1/quote", json=quoted))
            wrong = [reply.json()["error"]["param"] for reply in refused]
            assert wrong == ["max_tokens"] * 3 + ["prompt"] * 2
            assert await reserved(ingress, address) == 0
            await ingress.books.bookkeeper.reserve_fetch(key, "fetch-1", model_id=broken, num_bytes=GIB)
            assert await describe(ingress, key, broken) == 400
            assert await reserved(ingress, address) == 0, "what an earlier request set aside goes back too"
            await ingress.app.state.services.model(model)
            assert await describe(ingress, key, model) == 200
            assert await reserved(ingress, address) > 0, "a look at a job of long ago had none set aside"

    asyncio.run(asyncio.wait_for(scenario(), 100))


async def reserved(ingress: LocalIngress, address: str) -> int:
    return (await ingress.money(address))[1]


@pytest.mark.prove
def test_200_new_models_leave_disk_and_memory_within_their_bounds(redis_url: str, tmp_path: Path) -> None:
    play(redis_url, tmp_path, 200)
