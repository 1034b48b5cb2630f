"""Without retention no prompt and no answer is left on disk, and no stage in the middle ever gets one."""

import asyncio
import os
import pickle
import random
import sys
import time
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from redis.asyncio import Redis
from transformers import AutoTokenizer

from azu.client import Client
from azu.config import load_network
from azu.jobs.record import REMOVED
from azu.jobs.retention import REWRITING
from azu.launch.local_network import DEMO, LocalNetwork, demo_network
from azu.launch.redis_server import BOOKS_STORE, JOB_STORE, own_redis_url
from azu.redis_client import connect_redis
from azu.units import MIB
from tests.models.questions import built_in_folder
from tests.network.actors import actors_named, ask_inside
from tests.network.conftest import paying_user
from tests.network.test_secrets import ray_logs
from tests.network.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

MODEL = "azu/tiny-dense"
PROMPTS, AT_ONCE = 100, 4
# So many tokens in a row are no accident: one in 10^15.
TOKENS = 6
# The search compares the first so many bytes of each pattern at every place.
WORD = 8
PATIENCE_S = 240


@dataclass(frozen=True)
class Marked:
    """A prompt that occurs nowhere else, its answer, and the tokens of both."""

    job_id: str
    prompt: str
    answer: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    def patterns(self) -> dict[str, bytes]:
        """Return what its texts and tokens look like in a file, by what that is."""
        found = {"prompt": self.prompt.encode(), "prompt as JSON": _escaped(self.prompt)}
        # The stream has one token in each entry.
        found["answer's stream"] = f"azu:job:{self.job_id}:tokens".encode()
        if len(self.answer_ids) >= TOKENS and len(self.answer) >= WORD:
            found |= {"answer": self.answer.encode(), "answer as JSON": _escaped(self.answer)}
            found |= {f"answer, {name}": text for name, text in encodings(self.answer_ids).items()}
        # The last ones: what a template puts before a prompt is the same for all.
        return found | {f"prompt, {name}": text for name, text in encodings(self.prompt_ids[-9:-3]).items()}


def _escaped(text: str) -> bytes:
    return text.encode("unicode_escape")


def encodings(token_ids: Sequence[int]) -> dict[str, bytes]:
    """Return tokens as azu writes them: in JSON, streams and reprs, in tensors and in pickles."""
    small = (b"K" + bytes([one]) if one < 256 else b"M" + one.to_bytes(2, "little") for one in token_ids)
    return {
        "JSON": ",".join(map(str, token_ids)).encode(),
        "repr": ", ".join(map(str, token_ids)).encode(),
        "stream": " ".join(map(str, token_ids)).encode(),
        "int64": array("q", token_ids).tobytes(),
        "int32": array("i", token_ids).tobytes(),
        "pickle": b"".join(small),
    }


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[LocalNetwork]:
    """A network without retention, whose workers are so small that a model has a stage in the middle."""
    demo = load_network(DEMO)
    workers = tuple(one.model_copy(update={"vram": 5 * MIB}) for one in demo.workers)
    policy = demo.policy.model_copy(update={"retention_s": 0})
    with demo_network(home, print, demo.model_copy(update={"workers": workers, "policy": policy})) as network:
        yield network


def keep_what_crosses(actor: object) -> None:
    """Have a LayerActor keep the bytes of all that it gets from now on."""
    actor.crossed = []
    step, see = actor._runner.run, actor._runner.see

    def run(batch, frame):
        actor.crossed.append(pickle.dumps((batch, frame), 5))
        return step(batch, frame)

    def seeing(sequences):
        actor.crossed.append(pickle.dumps(sequences, 5))
        return see(sequences)

    actor._runner.run, actor._runner.see = run, seeing


def what_crossed(actor: object) -> list[bytes]:
    return actor.crossed


def ask(user: User, number: int, tokenizer: object) -> Marked:
    """Send one marked prompt in one of four ways, and read its whole answer."""
    chance = random.Random(number)
    words = " ".join("".join(chance.choices("bcdfgklmnprstvz", k=7)) for _ in range(4))
    prompt = f"{words} {chance.getrandbits(64):x}"
    sampling = {"temperature": 1.5, "seed": number, "ignore_eos": True} if number % 2 else {}
    if number % 4 == 3:
        sampling["repetition_penalty"] = 1.3
    if number % 5 == 4:
        job_id = user.submit(prompt, est_tokens=12).json()["job_id"]
        while (found := user.results(job_id))["status"] in ("queued", "running"):
            time.sleep(0.2)
        answer = str(found["text"])
    else:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 12, **sampling}
        client = Client(user.url, user.api_key)
        if number % 5 == 3:
            generation = client.generate(prompt, model=MODEL, max_tokens=12, **sampling)
            job_id, answer = generation.job_id, generation.text
        else:
            reply = user.http.post("/v1/completions", json=body).raise_for_status().json()
            job_id, answer = reply["azu"]["job_id"], reply["choices"][0]["text"]
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    return Marked(job_id, prompt, answer, tuple(ids), tuple(user.results(job_id)["token_ids"]))


def files_of(home: Path) -> dict[Path, bytes]:
    """Return every file under a home, through its links, and what Ray logged."""
    paths = {Path(folder, name) for folder, _, names in os.walk(home, followlinks=True) for name in names}
    return {path: path.read_bytes() for path in paths | set(ray_logs()) if path.is_file()}


async def values_of(redis: Redis) -> bytes:
    """Return all keys and values of a Redis: a file may hold them compressed."""
    read = {
        "string": redis.get, "hash": redis.hgetall, "set": redis.smembers, "stream": redis.xrange,
        "list": lambda key: redis.lrange(key, 0, -1), "zset": lambda key: redis.zrange(key, 0, -1),
    }  # fmt: skip
    keys = [key async for key in redis.scan_iter(count=1000)]
    return "\n".join([repr((key, await read[await redis.type(key)](key))) for key in keys]).encode()


async def stores_of(home: Path) -> dict[str, bytes]:
    """Return all that both stores hold."""
    found = {}
    for store in (BOOKS_STORE, JOB_STORE):
        redis = connect_redis(own_redis_url(home, store))
        found[store.name] = await values_of(redis)
        await redis.aclose()
    return found


def found_in(places: dict[object, bytes], marked: Sequence[Marked]) -> list[tuple[str, str]]:
    """Return where some pattern of some prompt is, and what it is."""
    named = {text: what for one in marked for what, text in one.patterns().items()}
    beginnings = defaultdict(list)
    for text in named:
        beginnings[int.from_bytes(text[:WORD], "little")].append(text)
    known = np.array(sorted(beginnings), dtype="<u8")
    hits = set()
    for place, content in places.items():
        for shift in range(min(WORD, len(content))):
            words = np.frombuffer(content, "<u8", (len(content) - shift) // WORD, shift)
            nearest = known[np.searchsorted(known, words).clip(max=len(known) - 1)]
            for at in np.flatnonzero(nearest == words):
                hits |= {
                    (str(place), named[text])
                    for text in beginnings[int(words[at])]
                    if content.startswith(text, shift + int(at) * WORD)
                }
    return sorted(hits)


async def all_removed(home: Path, marked: Sequence[Marked]) -> None:
    """Wait until no job has a record, then until the file was written anew, as if an hour had passed."""
    redis = connect_redis(own_redis_url(home, JOB_STORE))
    async with asyncio.timeout(PATIENCE_S):
        while await redis.exists(*(f"azu:job:{one.job_id}" for one in marked)):
            await asyncio.sleep(1)
        await redis.set(REMOVED, 1)
        while await redis.exists(REMOVED, REWRITING):
            await asyncio.sleep(1)
    await redis.aclose()


def test_nothing_of_a_hundred_prompts_is_left_and_no_middle_stage_had_one(
    running: LocalNetwork, home: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built_in_folder(MODEL))
    user = paying_user(running, "marked")
    ask(user, 0, tokenizer)  # the model is up
    stages = actors_named("layer:azu-tiny-dense")
    assert len(stages) >= 3
    for stage in stages:
        ask_inside(stage, keep_what_crosses)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        marked = list(threads.map(lambda number: ask(user, number, tokenizer), range(1, PROMPTS + 1)))
    before = found_in(files_of(home), marked)
    asyncio.run(all_removed(home, marked))
    crossed = [{"frames and steps": b"\n".join(ask_inside(one, what_crossed))} for one in stages]
    places = files_of(home) | asyncio.run(stores_of(home))
    kinds = [sorted({what for _, what in found_in(one, marked)}) for one in crossed]
    print(f"{len(places)} files and stores, {sum(map(len, places.values())) >> 20} MiB; before: {before}")
    print(f"crossed to each stage: {kinds}", file=sys.stderr)

    in_the_store = {what for place, what in before if "redis-jobs" in place}
    assert {"prompt, JSON", "answer's stream"} <= in_the_store, "the search works"
    assert found_in(places, marked) == []
    assert "prompt, pickle" in kinds[0], "the first stage has the prompts"
    assert "prompt, pickle" in kinds[-1], "a penalty looks at some"
    assert not any(kinds[1:-1]), "a stage in the middle has none"
    assert user.balance()[1] == 0
