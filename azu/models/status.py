"""The status of each model, from its first description to finished shards, kept in Redis."""

import logging
import time
from dataclasses import dataclass
from enum import StrEnum

from pydantic import ConfigDict, TypeAdapter

from azu.errors import Unavailable
from azu.redis_client import connect_redis_sync, typed_redis_errors

log = logging.getLogger(__name__)

_READY = "azu:model:ready"
_PROGRESS_PERIOD_S = 0.5
_PAUSE_S = 1.0


class ModelState(StrEnum):
    """A DESCRIBED model can be priced, a READY one placed; a FAILED model is tried again on request."""

    UNKNOWN = "unknown"
    DESCRIBED = "described"
    FETCHING = "fetching"
    CUTTING = "cutting"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model's state; `done_bytes` and `total_bytes` count its weights, downloaded or cut so far."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    model_id: str
    revision: str
    state: ModelState
    done_bytes: int = 0
    total_bytes: int = 0
    error: str | None = None


_STATUS = TypeAdapter(ModelStatus)


class RedisModelStatus:
    """The status of models: one key per model id, and the set of models that are cut.

    Methods raise Unavailable when Redis does not answer.
    """

    def __init__(self, url: str) -> None:
        self._redis = connect_redis_sync(url)

    def put(self, status: ModelStatus) -> None:
        """Replace the model's status."""
        with typed_redis_errors(), self._redis.pipeline() as pipeline:
            pipeline.set(_key(status.model_id), _STATUS.dump_json(status))
            note = pipeline.sadd if status.state is ModelState.READY else pipeline.srem
            note(_READY, status.model_id)
            pipeline.execute()

    def remove(self, model_id: str) -> None:
        """Forget a model."""
        with typed_redis_errors(), self._redis.pipeline() as pipeline:
            pipeline.delete(_key(model_id))
            pipeline.srem(_READY, model_id)
            pipeline.execute()

    def get(self, model_id: str) -> ModelStatus:
        """Return the model's status, UNKNOWN for a model without one."""
        with typed_redis_errors():
            content = self._redis.get(_key(model_id))
        if content is None:
            return ModelStatus(model_id=model_id, revision="", state=ModelState.UNKNOWN)
        return _STATUS.validate_json(content)

    def ready(self) -> list[ModelStatus]:
        """Return the models that are cut, sorted by id."""
        with typed_redis_errors():
            model_ids = self._redis.smembers(_READY)
        return [self.get(model_id) for model_id in sorted(map(str, model_ids))]


def _key(model_id: str) -> str:
    return f"azu:model:status:{model_id}"


class StatusReporter:
    """Writes the status of one model at one revision; progress at most twice a second.

    While Redis is away progress is left out, and an end waits for it.
    """

    def __init__(self, store: RedisModelStatus, model_id: str, revision: str) -> None:
        self._store = store
        self._model = (model_id, revision)
        self._state = ModelState.UNKNOWN
        self._written_s = 0.0

    def described(self, weight_bytes: int) -> None:
        """Write that the model can be priced; raises Unavailable: a caller waits for the answer."""
        self._put(ModelState.DESCRIBED, 0, weight_bytes)

    def fetching(self, done_bytes: int, total_bytes: int) -> None:
        """Write how much of the weights is downloaded."""
        self._progress(ModelState.FETCHING, done_bytes, total_bytes)

    def cutting(self, done_bytes: int, total_bytes: int) -> None:
        """Write how much of the weights is cut."""
        self._progress(ModelState.CUTTING, done_bytes, total_bytes)

    def ready(self, weight_bytes: int) -> None:
        """Write that every shard is finished."""
        self._put(ModelState.READY, weight_bytes, weight_bytes)

    def failed(self, error: str) -> None:
        """Write why the model could not be cut."""
        self._put(ModelState.FAILED, 0, 0, error)

    def _progress(self, state: ModelState, done_bytes: int, total_bytes: int) -> None:
        if state is not self._state or time.monotonic() - self._written_s >= _PROGRESS_PERIOD_S:
            self._put(state, done_bytes, total_bytes)

    def _put(self, state: ModelState, done_bytes: int, total_bytes: int, error: str | None = None) -> None:
        status = ModelStatus(*self._model, state, done_bytes, total_bytes, error)
        while True:
            try:
                self._store.put(status)
                break
            except Unavailable as away:
                if state is ModelState.DESCRIBED:
                    raise
                if state in (ModelState.FETCHING, ModelState.CUTTING):
                    break
                log.warning("the status of %s is not written yet: %s", self._model[0], away.message)
                time.sleep(_PAUSE_S)
        self._state = state
        self._written_s = time.monotonic()
