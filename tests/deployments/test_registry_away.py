"""A model that the ingress knows is served while the registry does not answer, and ended jobs are shown."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from azu.errors import Unavailable
from deployments import services
from tests.deployments.local import LocalIngress, Scenario, play_as_user

ASKED = {"model": "azu/tiny-dense", "prompt": "Hi", "max_tokens": 4}


@pytest.fixture
def play(redis_url: str, tmp_path: Path) -> Callable[[Scenario], None]:
    return partial(play_as_user, redis_url, tmp_path)


@contextmanager
def registry_away(ingress: LocalIngress) -> Iterator[None]:
    """Have no call of the registry answered."""
    here = ingress.app.state.services
    actors = here._actors

    class Away:
        def __getattr__(self, name: str) -> Any:
            raise Unavailable("the registry is not up")

    here._actors = {**actors, services.REGISTRY: Away()}
    try:
        yield
    finally:
        here._actors = actors


def test_a_known_model_is_served_while_the_registry_is_away(play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_REFRESH_S", 0.0)

    async def scenario(ingress: LocalIngress, http: httpx.AsyncClient) -> None:
        assert (await http.post("/v1/completions", json=ASKED)).status_code == 200
        with registry_away(ingress):
            assert (await http.post("/v1/completions", json=ASKED)).status_code == 200
            other = await http.post("/v1/completions", json=ASKED | {"model": "azu/tiny-moe"})
            assert (other.status_code, other.json()["error"]["code"]) == (503, "unavailable")

    play(scenario)


def test_an_ended_job_shows_its_end_and_its_receipt_without_its_model(play) -> None:
    async def scenario(ingress: LocalIngress, http: httpx.AsyncClient) -> None:
        job_id = (await http.post("/v1/completions", json=ASKED)).json()["id"].removeprefix("cmpl-")
        whole = (await http.get(f"/results/{job_id}")).json()
        ingress.app.state.services._models.clear()
        with registry_away(ingress):
            found = (await http.get(f"/results/{job_id}")).raise_for_status().json()

        assert whole["text"]
        assert found["text"] == ""
        same = ("status", "token_ids", "finish_reason", "receipt", "usage")
        assert {name: found[name] for name in same} == {name: whole[name] for name in same}

    play(scenario)
