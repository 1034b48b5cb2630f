"""The status of a model is the one put last; progress is written rarely."""

import threading
from pathlib import Path

import pytest
import redis

from azu.errors import Unavailable
from azu.models.registry import ModelRegistry
from azu.models.status import ModelState, ModelStatus, RedisModelStatus, StatusReporter
from tests.redis_server import start_redis


class Recorder:
    def __init__(self) -> None:
        self.put_states: list[ModelStatus] = []

    def put(self, status: ModelStatus) -> None:
        self.put_states.append(status)

    def get(self, model_id: str) -> ModelStatus:
        raise NotImplementedError

    def ready(self) -> list[ModelStatus]:
        raise NotImplementedError


def test_a_model_has_the_status_that_was_put_last(redis_url):
    store = RedisModelStatus(redis_url)
    first = ModelStatus("org/model", "r1", ModelState.CUTTING, 5, 10)
    last = ModelStatus("org/model", "r1", ModelState.FAILED, 0, 0, "model.safetensors is truncated")
    store.put(first)
    assert store.get("org/model") == first
    store.put(last)
    assert RedisModelStatus(redis_url).get("org/model") == last


def test_a_model_without_a_status_is_unknown(redis_url):
    status = RedisModelStatus(redis_url).get("org/other")
    assert (status.state, status.error) == (ModelState.UNKNOWN, None)


def test_only_models_that_are_cut_are_ready(redis_url):
    store = RedisModelStatus(redis_url)
    cut = ModelStatus("org/cut", "r1", ModelState.READY, 10, 10)
    store.put(ModelStatus("org/described", "r1", ModelState.DESCRIBED))
    store.put(cut)
    store.put(ModelStatus("org/failed", "r1", ModelState.FAILED))
    assert cut in store.ready()
    assert {status.model_id for status in store.ready()}.isdisjoint({"org/described", "org/failed"})


@pytest.mark.prove
def test_a_redis_that_does_not_answer_is_unavailable():
    store = RedisModelStatus("redis://127.0.0.1:9/0")
    with pytest.raises(Unavailable):
        store.put(ModelStatus("org/model", "r1", ModelState.READY))
    with pytest.raises(Unavailable):
        store.get("org/model")
    with pytest.raises(Unavailable):
        store.ready()


def test_progress_is_written_rarely_and_each_change_of_state_at_once():
    store = Recorder()
    report = StatusReporter(store, "org/model", "r1")
    report.described(1000)
    for done in range(1000):
        report.fetching(done, 1000)
    for done in range(1000):
        report.cutting(done, 1000)
    report.ready(1000)
    states = [status.state for status in store.put_states]
    assert [state for index, state in enumerate(states) if state not in states[:index]] == [
        ModelState.DESCRIBED,
        ModelState.FETCHING,
        ModelState.CUTTING,
        ModelState.READY,
    ]
    assert len(states) < 10
    assert store.put_states[-1] == ModelStatus("org/model", "r1", ModelState.READY, 1000, 1000)


def test_a_description_is_refused_while_redis_is_away(tmp_path: Path) -> None:
    server = start_redis(tmp_path / "redis")
    registry = ModelRegistry(
        tmp_path / "registry", model_roots=(), status=RedisModelStatus(server.url), max_model_bytes=2**30
    )
    try:
        with redis.Redis(port=server.port) as admin:
            admin.replicaof("127.0.0.1", 1)
            with pytest.raises(Unavailable):
                registry.describe("azu/tiny-dense")
            admin.replicaof("NO", "ONE")
        described = registry.describe("azu/tiny-dense")
        written = RedisModelStatus(server.url).get("azu/tiny-dense")
        assert (written.state, written.revision) == (ModelState.DESCRIBED, described.revision)
    finally:
        server.kill()


def test_a_cut_goes_on_without_redis_and_waits_only_to_tell_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("azu.models.status._PAUSE_S", 0.01)
    server = start_redis(tmp_path)
    store, admin = RedisModelStatus(server.url), redis.Redis(port=server.port)
    report = StatusReporter(store, "test/model", "r1")
    try:
        report.described(10)
        admin.replicaof("127.0.0.1", 1)
        report.cutting(5, 10)
        assert store.get("test/model").state is ModelState.DESCRIBED
        end = threading.Thread(target=report.ready, args=(10,))
        end.start()
        admin.replicaof("NO", "ONE")
        end.join(30)
        assert store.get("test/model").state is ModelState.READY
    finally:
        server.kill()
