"""The metrics of a running network without Ray's agents."""

import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from azu.launch.local_network import LocalNetwork
from tests.network.user import User

pytestmark = pytest.mark.cluster

_TIMEOUT_S = 30.0
# Twice as long as a busy process waits before it sends what it counted.
_SENT_S = 2.0


def scrape(network: LocalNetwork) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    headers = {"authorization": f"Bearer {network.admin_key}"}
    answer = httpx.get(f"{network.url}/metrics", headers=headers, timeout=30).raise_for_status()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def at_rest(network: LocalNetwork) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the metrics once every process has sent what it counted for earlier jobs."""
    found = scrape(network)
    while True:
        before = found
        time.sleep(_SENT_S)
        found = scrape(network)
        counters = [key for key in found if "_tokens" in key[0]]
        if all(before.get(key) == found[key] for key in counters):
            return found


def test_metrics_need_the_admin_key(network: LocalNetwork, user: User) -> None:
    assert httpx.get(f"{network.url}/metrics", timeout=30).status_code == 401
    assert user.http.get("/metrics").status_code == 401


def test_a_paid_prompt_shows_in_tokens_time_and_money(network: LocalNetwork, user: User) -> None:
    model = frozenset({("model", "azu/tiny-dense")})
    before = at_rest(network)
    body = {"model": "azu/tiny-dense", "prompt": "Hello", "max_tokens": 20, "ignore_eos": True}
    usage = user.http.post("/v1/completions", json=body).raise_for_status().json()["usage"]

    def rise(name: str, labels: frozenset[tuple[str, str]] = frozenset()) -> float:
        return after.get((name, labels), 0) - before.get((name, labels), 0)

    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        after = scrape(network)
        ended = rise("azu_jobs_ended_total", model | {("state", "done")})
        charged = rise("azu_lamports_charged_total")
        if ended and charged and rise("azu_generated_tokens_total", model) >= 20:
            break
        assert time.monotonic() < deadline, "the metrics did not follow"
        time.sleep(0.2)

    assert rise("azu_prompt_tokens_total", model) == usage["prompt_tokens"]
    assert rise("azu_time_to_first_token_seconds_count", model) == 1
    assert rise("azu_time_per_token_seconds_count", model) == 19
    assert ended == 1
    assert charged == usage["cost_lamports"]
    assert 0 < rise("azu_lamports_earned_total") < usage["cost_lamports"]
    assert after["azu_kv_blocks", model] > 0
    assert after["azu_nodes", frozenset({("state", "alive")})] == 3
