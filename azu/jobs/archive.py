"""Jobs without prompt and answer: what receipts and lists need, in a few hundred bytes each.

`azu:jobs:archive`  hash: job id -> archived job; "like:" and a digest -> the text that an archived job is
                    compressed against. Jobs that ran in one topology share such a text.
"""

import base64
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from redis.asyncio import Redis

from azu.jobs.record import (
    ENDED,
    GROUP,
    OUTCOME,
    QUEUE,
    REMOVED,
    JobRecord,
    asked_key,
    job_key,
    read_record,
    readers_key,
    record_of,
    tokens_key,
)
from azu.protocol.job import JobOutcome

ARCHIVE = "azu:jobs:archive"
_MAX_ERROR_CHARACTERS = 200
_DIGEST_CHARACTERS = 12
_ADDRESS_BYTES = 20
_RAW_DEFLATE = -zlib.MAX_WBITS


def like_key(digest: str) -> str:
    """Return the archive's field with the text of a digest."""
    return f"like:{digest}"


def digest_of(packed: str) -> str:
    """Return the digest of the text that an archived job is compressed against."""
    return packed[:_DIGEST_CHARACTERS]


def shared_text(outcome: JobOutcome) -> tuple[str, str]:
    """Return a text that is nearly that of every job of this topology, and a digest of what they share."""
    receipt = outcome.receipt
    # Each start of a model gives its actors other names.
    places = [replace(one, actor="") for one in receipt.topology]
    shared = receipt.model_id, receipt.revision, repr(places), *sorted(receipt.worker_lamports)
    digest = hashlib.sha256("\n".join(shared).encode()).hexdigest()[:_DIGEST_CHARACTERS]
    return digest, _text(outcome)


def pack(record: JobRecord, digest: str, like: str) -> str:
    """Return an ended job as the archive keeps it, compressed against the text `like`."""
    assert record.outcome is not None
    job, outcome = record.job, record.outcome
    if outcome.error is not None:
        short = str(outcome.error.get("message"))[:_MAX_ERROR_CHARACTERS]
        outcome = replace(outcome, error={**outcome.error, "message": short})
    text = f"{job.created_at_ms} {job.choices} {job.key_id} {_text(outcome)}"
    deflate = zlib.compressobj(9, zlib.DEFLATED, _RAW_DEFLATE, 9, zdict=like.encode())
    content = bytes.fromhex(job.address[2:]) + deflate.compress(text.encode()) + deflate.flush()
    return digest + base64.b85encode(content).decode()


def unpack(job_id: str, packed: str, like: str) -> JobRecord:
    """Return an archived job; its prompt is empty and its sampling parameters are not known any more."""
    content = base64.b85decode(packed[_DIGEST_CHARACTERS:])
    address = f"0x{content[:_ADDRESS_BYTES].hex()}"
    inflate = zlib.decompressobj(_RAW_DEFLATE, zdict=like.encode())
    text = inflate.decompress(content[_ADDRESS_BYTES:]).decode()
    facts, brace, rest = text.partition("{")
    created_at_ms, choices, key_id, *_ = [*facts.split(), ""]  # jobs of long ago have no key
    outcome = OUTCOME.validate_json(brace + rest)
    receipt = replace(
        outcome.receipt, job_id=job_id, address=address, transfer_id=outcome.receipt.transfer_id + job_id
    )
    return record_of(replace(outcome, receipt=receipt), int(created_at_ms), int(choices), key_id)


def _text(outcome: JobOutcome) -> str:
    """Return an outcome without what the archive has beside it."""
    receipt = outcome.receipt
    transfer = receipt.transfer_id.removesuffix(receipt.job_id)
    bare = replace(receipt, job_id="", address="", transfer_id=transfer)
    return OUTCOME.dump_json(replace(outcome, receipt=bare)).decode()


class Archive:
    """Holds the archived jobs. Every method raises Unavailable while Redis is away, and may be repeated."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def put(self, ended: Mapping[str, Mapping[str, str]], now_ms: int) -> None:
        """Archive ended jobs, given by their records' hashes, and remove all else that Redis has of them.

        One that cannot be read is removed: the books keep how it ended.
        """
        read = {
            job_id: read_record(job_id, fields) for job_id, fields in ended.items() if "outcome" in fields
        }
        records = [one for one in read.values() if isinstance(one, JobRecord)]
        likes = await self._likes([record.outcome for record in records if record.outcome is not None])
        async with self._redis.pipeline(transaction=True) as write:
            for record in records:
                assert record.outcome is not None
                job_id = record.job.job_id
                digest, _ = shared_text(record.outcome)
                write.hset(ARCHIVE, job_id, pack(record, digest, likes[digest]))
            for job_id in read:
                write.delete(job_key(job_id), tokens_key(job_id), readers_key(job_id))
                write.hdel(asked_key(ended[job_id].get("asked", "")), job_id)
                if queue_id := ended[job_id].get("queue_id"):
                    # Without the record the job could not be taken out of the queue later.
                    write.xack(QUEUE, GROUP, queue_id)
                    write.xdel(QUEUE, queue_id)
                write.set(REMOVED, now_ms, nx=True)
            if ended:
                write.zrem(ENDED, *ended)
            await write.execute()

    async def read(self, job_ids: Sequence[str]) -> Mapping[str, JobRecord]:
        """Return those of the jobs that are archived."""
        if not job_ids:
            return {}
        found = cast(list[str | None], await self._redis.hmget(ARCHIVE, list(job_ids)))
        packed = {job_id: text for job_id, text in zip(job_ids, found, strict=True) if text is not None}
        likes = await self._stored({digest_of(text) for text in packed.values()})
        return {job_id: unpack(job_id, text, likes[digest_of(text)]) for job_id, text in packed.items()}

    async def _likes(self, outcomes: Sequence[JobOutcome]) -> Mapping[str, str]:
        """Return the text of each outcome's digest; the first outcome of a digest gives it."""
        texts = dict(map(shared_text, outcomes))
        async with self._redis.pipeline(transaction=False) as write:
            for digest, text in texts.items():
                write.hsetnx(ARCHIVE, like_key(digest), text)
            await write.execute()
        return await self._stored(texts)

    async def _stored(self, digests: "Mapping[str, str] | set[str]") -> Mapping[str, str]:
        wanted = list(digests)
        if not wanted:
            return {}
        found = cast(list[str], await self._redis.hmget(ARCHIVE, [like_key(digest) for digest in wanted]))
        return dict(zip(wanted, found, strict=True))
