"""Clients that hang up: their jobs stop at once and wait, and the same request again goes on with them.

A job that was asked for over a connection has readers: the first, and those that come back. When the last one
has left, the job is cancelled for a while and keeps its reservation (`left` in its record is the time until
which it waits). A request with the same key and content within that time reads it from its beginning; else
the job ends, and is charged as it stands. The readers of an ingress that died have left too. Keys:

`azu:jobs:asked:{key id}:{digest}`  hash: the jobs of one request -> until when the request may come again, in
                                    ms, or the ingress of a first reader that is there.
`azu:jobs:left:{address}`           sorted set: jobs that wait for their clients, by the same time.
`azu:jobs:ingress:{id}`             a mark that lives as long as readers of the ingress may come back.
`azu:job:{id}:readers`              set: those who came back and are there.
"""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import cast

from redis.asyncio import Redis

from azu.jobs.record import CANCELLATIONS_KEPT, CANCELLED, asked_key, job_key, readers_key

BEAT_S = 3.0
# A live ingress may be late by so much.
_SILENT_S = 12.0
# Each return has the prompt computed again, which is not charged.
MOST_RETURNS = 8
_READERS_KEPT_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class Reader:
    """Who reads a job over one connection; `name` is empty for the first, whose request began the job.

    `asked` names the request, empty for a job that no connection waits for.
    """

    job_id: str
    address: str
    asked: str
    name: str = ""


def request_name(key_id: str, content: bytes) -> str:
    """Return the name of the requests that one key sends with one content."""
    return f"{key_id}:{hashlib.sha256(content).hexdigest()}"


class Departures:
    """Notes who reads which job, for one ingress. Every method may be called again: nothing happens twice.

    A job waits for `kept_s` after its last reader has left; with 0 it ends at once.
    """

    def __init__(self, redis: Redis, kept_s: float) -> None:
        self.ingress = f"ingress-{secrets.token_hex(8)}"
        self._redis = redis
        self._kept_ms = round(kept_s * 1000)
        self._leave = redis.register_script(files(__package__).joinpath("leave.lua").read_text())
        self._come_back = redis.register_script(files(__package__).joinpath("come_back.lua").read_text())

    async def beat(self) -> None:
        """Note that this ingress lives; to be called every BEAT_S."""
        await self._redis.set(_ingress_key(self.ingress), 1, px=self._kept_ms + round(_SILENT_S * 1000))

    async def find(self, address: str, asked: str) -> Reader | None:
        """Return a new reader of a job that the same request began and whose readers left lately.

        A job that waits comes before one that others came back to.
        """
        if not self._kept_ms:
            return None
        states = cast(Mapping[str, str], await self._redis.hgetall(asked_key(asked)))
        left = [job_id for job_id, state in states.items() if await self._is_left(state)]
        for how in ("waits", "first left") if left else ():
            for job_id in left:
                reader = Reader(job_id, address, asked, secrets.token_hex(8))
                if await self._try_to_come_back(reader, how):
                    return reader
        return None

    async def come_back(self, reader: Reader) -> None:
        """Note a reader that knows its job; a job that waits for its client goes on."""
        await self._try_to_come_back(reader, "")

    async def _try_to_come_back(self, reader: Reader, how: str) -> bool:
        arguments: list[str | int] = [reader.job_id, reader.name, how, _READERS_KEPT_S, CANCELLATIONS_KEPT]
        return bool(await self._come_back(_keys(reader), arguments))

    async def leave(self, reader: Reader) -> None:
        """Note that a reader left before its answer was whole."""
        arguments: list[str | int] = [
            reader.job_id,
            reader.name,
            self._kept_ms,
            MOST_RETURNS,
            CANCELLATIONS_KEPT,
        ]
        await self._leave(_keys(reader), arguments)

    async def answered(self, reader: Reader) -> None:
        """Note that a reader has its whole answer: the next request like its own is another job."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.hdel(asked_key(reader.asked), reader.job_id)
            pipeline.srem(readers_key(reader.job_id), reader.name)
            await pipeline.execute()

    async def waiting(self, address: str) -> list[str]:
        """Return the jobs of an address that wait for their clients."""
        return cast(list[str], await self._redis.zrange(_left_key(address), 0, -1))

    async def _is_left(self, state: str) -> bool:
        """Return whether a job's first reader left, or its ingress died, so lately that it may come back."""
        return state.isdigit() or 0 < await self._redis.pttl(_ingress_key(state)) < self._kept_ms


async def may_be_read(redis: Redis, job_id: str, asked: str, now_ms: int) -> bool:
    """Say whether a client reads a job over a connection, or may still come back to it."""
    state = cast(str | None, await redis.hget(asked_key(asked), job_id))
    if await redis.scard(readers_key(job_id)):
        return True
    if state is None:
        return False
    return int(state) > now_ms if state.isdigit() else bool(await redis.exists(_ingress_key(state)))


def _keys(reader: Reader) -> list[str]:
    job_id = reader.job_id
    asked, left = asked_key(reader.asked), _left_key(reader.address)
    return [job_key(job_id), readers_key(job_id), CANCELLED, asked, left]


def _left_key(address: str) -> str:
    return f"azu:jobs:left:{address}"


def _ingress_key(ingress: str) -> str:
    return f"azu:jobs:ingress:{ingress}"
