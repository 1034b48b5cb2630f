"""Saying how far a model is, often enough for people and seldom enough for Redis."""

import time

from azu.registry.status import ModelState, ModelStatus, ModelStatusStore

_PERIOD_S = 0.5


class Report:
    """Writes the status of one model at one revision."""

    def __init__(self, store: ModelStatusStore, model_id: str, revision: str) -> None:
        self._store = store
        self._model = (model_id, revision)
        self._state = ModelState.UNKNOWN
        self._written_s = 0.0

    def described(self, weight_bytes: int) -> None:
        """Say that the model can be priced, its weights being that large."""
        self._put(ModelState.DESCRIBED, 0, weight_bytes)

    def fetching(self, done_bytes: int, total_bytes: int) -> None:
        """Say how much of the weights has come."""
        self._progress(ModelState.FETCHING, done_bytes, total_bytes)

    def cutting(self, done_bytes: int, total_bytes: int) -> None:
        """Say how much of the weights is cut."""
        self._progress(ModelState.CUTTING, done_bytes, total_bytes)

    def ready(self, weight_bytes: int) -> None:
        """Say that every shard is there."""
        self._put(ModelState.READY, weight_bytes, weight_bytes)

    def failed(self, error: str) -> None:
        """Say why it went no further."""
        self._put(ModelState.FAILED, 0, 0, error)

    def _progress(self, state: ModelState, done_bytes: int, total_bytes: int) -> None:
        if state is not self._state or time.monotonic() - self._written_s >= _PERIOD_S:
            self._put(state, done_bytes, total_bytes)

    def _put(self, state: ModelState, done_bytes: int, total_bytes: int, error: str | None = None) -> None:
        self._store.put(ModelStatus(*self._model, state, done_bytes, total_bytes, error))
        self._state = state
        self._written_s = time.monotonic()
