"""Records of the deployments that run, so that the next scheduler finds their actors again.

`azu:fleet:epoch`  the highest epoch that a topology was given.
`azu:fleet:models` hash: model id, revision and replica -> the deployment's record (JSON).
`azu:fleet:earned` what owners lent and earned (JSON of azu/cluster/earnings.py).
`azu:fleet:canary` hash: model id, revision and dtype -> the known answer to the canary (JSON).
"""

import logging
from dataclasses import dataclass
from typing import cast

from pydantic import ConfigDict, TypeAdapter, ValidationError
from redis.asyncio import Redis

from azu.cluster.earnings import OwnersEarnings
from azu.engine.canary import CanaryAnswer
from azu.protocol.topology import Topology
from azu.redis_client import connect_redis, connect_redis_sync, retry_until_available, typed_redis_errors

log = logging.getLogger(__name__)

EPOCH = "azu:fleet:epoch"
MODELS = "azu:fleet:models"
CANARY = "azu:fleet:canary"
EARNED = "azu:fleet:earned"


@dataclass(frozen=True, slots=True)
class PieceRecord:
    """A stage or an expert set by its index, its actor's name and the epoch that this was started under."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    is_stage: bool
    index: int
    epoch: int
    name: str


@dataclass(frozen=True, slots=True)
class DeploymentRecord:
    """A deployment: where its pieces are, the actors' names, and the payout address of each node."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    topology: Topology
    pieces: tuple[PieceRecord, ...]
    pipeline: str

    @property
    def names(self) -> set[str]:
        """The actors that belong to it."""
        return {self.pipeline, *(piece.name for piece in self.pieces)}


_RECORD = TypeAdapter(DeploymentRecord)
_ANSWER = TypeAdapter(CanaryAnswer)


class DeploymentStore:
    """Deployment records in Redis; every method waits as long as Redis is away."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._epoch = 0

    @classmethod
    def from_url(cls, url: str) -> "DeploymentStore":
        """Return the records in the Redis at `url`; connects when first used."""
        return cls(connect_redis(url))

    async def next_epoch(self) -> int:
        """Return an epoch that is higher than every other, also where Redis lost the last ones."""
        epoch = int(await retry_until_available(lambda: self._redis.incr(EPOCH)))
        if epoch <= self._epoch:
            epoch = self._epoch + 1
            await retry_until_available(lambda: self._redis.set(EPOCH, epoch))
        self._epoch = epoch
        return epoch

    async def all(self) -> list[DeploymentRecord]:
        """Return every record; one that cannot be read is deleted, and the next `sweep` ends its actors."""
        found = cast(dict[str, str], await retry_until_available(lambda: self._redis.hgetall(MODELS)))
        records = {key: _read(content) for key, content in sorted(found.items())}
        if odd := [key for key, record in records.items() if record is None]:
            await retry_until_available(lambda: self._redis.hdel(MODELS, *odd))
        return [record for record in records.values() if record is not None]

    async def keep(self, record: DeploymentRecord) -> None:
        """Write a deployment's record in place of the one before."""
        content = _RECORD.dump_json(record).decode()
        await retry_until_available(lambda: self._redis.hset(MODELS, _field(record.topology), content))

    async def canary(self, model: tuple[str, str, str]) -> CanaryAnswer | None:
        """Return what the canary answers for a model (id, revision, dtype), None if that is not known."""
        found = await retry_until_available(lambda: self._redis.hget(CANARY, "@".join(model)))
        try:
            return None if found is None else _ANSWER.validate_json(cast(str, found))
        except ValidationError as error:
            log.warning("what the canary answers cannot be read and is found anew: %s", error)
            return None

    async def keep_canary(self, model: tuple[str, str, str], answer: CanaryAnswer) -> None:
        """Write what the canary answers for a model."""
        content = _ANSWER.dump_json(answer).decode()
        await retry_until_available(lambda: self._redis.hset(CANARY, "@".join(model), content))

    async def earnings(self) -> OwnersEarnings:
        """Return what owners lent and earned under earlier schedulers."""
        found = await retry_until_available(lambda: self._redis.get(EARNED))
        return OwnersEarnings.from_json(cast(str, found or "{}"))

    async def keep_earnings(self, earnings: OwnersEarnings) -> None:
        """Write what owners lent and earned."""
        content = earnings.to_json()
        await retry_until_available(lambda: self._redis.set(EARNED, content))

    async def forget(self, topology: Topology) -> None:
        """Delete a deployment's record; a record that is missing is no error."""
        await retry_until_available(lambda: self._redis.hdel(MODELS, _field(topology)))


def deployed_models(redis_url: str) -> set[tuple[str, str]]:
    """Return the ids and revisions of the models with a record; raises Unavailable while Redis is away."""
    with typed_redis_errors(), connect_redis_sync(redis_url) as redis:
        records = [_read(one) for one in redis.hgetall(MODELS).values()]
    return {(one.topology.model_id, one.topology.revision) for one in records if one is not None}


def _read(content: str) -> DeploymentRecord | None:
    try:
        return _RECORD.validate_json(content)
    except ValidationError as error:
        log.warning("the record of a deployment cannot be read and is left out: %s", error)
        return None


def _field(topology: Topology) -> str:
    return f"{topology.model_id}@{topology.revision}#{topology.replica}"
