"""Which models stand, written down so that whoever schedules next finds their pieces again.

`azu:fleet:epoch`  the highest epoch that a topology was given.
`azu:fleet:models` hash: model id, revision and replica -> the standing model (JSON).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from pydantic import ConfigDict, TypeAdapter
from redis.asyncio import Redis

from azu.protocol.topology import Topology
from azu.redis_client import connect_redis, retry_until_available

EPOCH = "azu:fleet:epoch"
MODELS = "azu:fleet:models"


@dataclass(frozen=True, slots=True)
class StandingPiece:
    """A stage, or an expert set, by its index; `name` is its actor's and `epoch` the one it came up under."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    is_stage: bool
    index: int
    epoch: int
    name: str


@dataclass(frozen=True, slots=True)
class DeploymentRecord:
    """A model that is up: where its pieces are, the actors' names, and who is paid for each node."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    topology: Topology
    pieces: tuple[StandingPiece, ...]
    pipeline: str
    payout_by_node: Mapping[str, str]

    @property
    def names(self) -> set[str]:
        """The actors that belong to it."""
        return {self.pipeline, *(piece.name for piece in self.pieces)}


class StandingModels(Protocol):
    """What outlives the scheduler."""

    async def next_epoch(self) -> int:
        """Return an epoch that is higher than every other."""

    async def all(self) -> list[DeploymentRecord]:
        """Return the models that stand."""

    async def keep(self, standing: DeploymentRecord) -> None:
        """Write a model down as it stands now."""

    async def forget(self, topology: Topology) -> None:
        """Strike a model out; one that is not written down is no error."""


_STANDING = TypeAdapter(DeploymentRecord)


class RedisStanding:
    """Standing models in Redis; waits however long Redis is away."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    @classmethod
    def from_url(cls, url: str) -> "RedisStanding":
        """Return what is kept in the Redis at `url`; connects when first used."""
        return cls(connect_redis(url))

    async def next_epoch(self) -> int:
        """Return an epoch that is higher than every other."""
        return int(await retry_until_available(lambda: self._redis.incr(EPOCH)))

    async def all(self) -> list[DeploymentRecord]:
        """Return the models that stand."""
        found = await retry_until_available(lambda: self._redis.hgetall(MODELS))
        return [
            _STANDING.validate_json(standing) for _, standing in sorted(cast(dict[str, str], found).items())
        ]

    async def keep(self, standing: DeploymentRecord) -> None:
        """Write a model down as it stands now."""
        content = _STANDING.dump_json(standing).decode()
        await retry_until_available(lambda: self._redis.hset(MODELS, _field(standing.topology), content))

    async def forget(self, topology: Topology) -> None:
        """Strike a model out; one that is not written down is no error."""
        await retry_until_available(lambda: self._redis.hdel(MODELS, _field(topology)))


def _field(topology: Topology) -> str:
    return f"{topology.model_id}@{topology.revision}#{topology.replica}"
