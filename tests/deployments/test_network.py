"""What the network shows of itself: its models' activity, and what a machine that joins would hold."""

import asyncio
from pathlib import Path

import httpx

from azu import metrics
from azu.api.network import Activity
from azu.metrics import Meter
from azu.units import GIB
from deployments.network import activity_of
from tests.deployments.local import ADMIN_KEY, local_ingress, policy_with


def test_a_model_s_activity_is_its_own() -> None:
    meter = Meter()
    meter.count(metrics.GENERATED_TOKENS, 9, "m")
    meter.count(metrics.GENERATED_TOKENS, 100, "other")
    meter.count(metrics.RECOVERIES, 1, "m", "repaired")
    meter.set_gauge(metrics.SEQUENCES, {("m", "running"): 2, ("m", "waiting"): 1})
    meter.observe(metrics.HOP, 0.002, "m", "0")
    meter.observe(metrics.HOP, 0.004, "m", "1")

    found = activity_of(meter.snapshot(), "m")

    assert found.generated_tokens == 9
    assert (found.running_sequences, found.waiting_sequences) == (2, 1)
    assert found.recoveries == 1
    assert (found.hop.count, found.hop.seconds) == (2, 0.006)
    assert activity_of(meter.snapshot(), "unknown") == Activity()


def test_a_machine_learns_without_a_key_what_it_would_hold_and_how_much_is_asked_is_bounded(
    redis_url: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        policy = policy_with(sign_ins_per_minute=1, sign_in_burst=3)
        async with (
            local_ingress(redis_url, tmp_path, policy) as ingress,
            httpx.AsyncClient(transport=ingress.transport, base_url="http://azu") as http,
        ):
            device = {"vram_bytes": 3 * GIB, "memory_bytes_per_s": 1e11, "flops_per_s": 1e13}
            answer = await http.post("/v1/nodes/offer", json=device)
            assert answer.json() == {
                "pieces": [{"model_id": "azu/tiny-dense", "layers": 4, "num_layers": 12}],
                "lamports_per_day": 10 * 3 * 24,
            }
            for wrong in ({"vram_bytes": 0}, {"flops_per_s": "NaN"}, {"memory_bytes_per_s": -1}):
                refused = await http.post("/v1/nodes/offer", json=device | wrong)
                assert refused.status_code == 400
            asked = [await http.post("/v1/nodes/offer", json=device) for _ in range(3)]
            assert [one.status_code for one in asked] == [200, 200, 429]

    asyncio.run(scenario())


def test_who_tries_wrong_keys_gets_429_whichever_it_tries_and_users_of_that_address_go_on(
    redis_url: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with local_ingress(redis_url, tmp_path) as ingress:
            _, used = await ingress.user()
            async with ingress.client(used) as http:
                assert (await http.get("/v1/balance")).status_code == 200
            async with ingress.client() as http:

                async def ask(path: str, key: str) -> httpx.Response:
                    method = "POST" if path.endswith("leave") else "GET"
                    return await http.request(method, path, headers={"authorization": f"Bearer {key}"})

                paths = ("/v1/balance", "/metrics", "/v1/nodes/ada/leave")
                tried = [await ask(paths[number % 3], f"azu-sk-{number}") for number in range(70)]
                assert [one.status_code for one in tried[:60]] == [401] * 60
                refused = tried[-1]
                assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
                assert 1 <= int(refused.headers["retry-after"]) <= 2
                # A guess that is right is refused as the others are.
                assert (await ask("/v1/nodes/ada/leave", ADMIN_KEY)).status_code == 429
                assert (await ask("/v1/balance", used)).status_code == 200
                assert (await http.get("/v1/balance")).status_code == 401

    asyncio.run(scenario())
