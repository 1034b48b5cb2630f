"""schemathesis over the ingress's own OpenAPI schema, over HTTP: nothing breaks, errors have one shape."""

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
import pytest
import schemathesis
import uvicorn
from huggingface_hub import constants
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from azu.ledger.accounts import user_available, user_reserved
from tests.deployments.local import LocalIngress, local_ingress, unhurried

pytestmark = pytest.mark.prove

SEED = int(os.environ.get("AZU_TEST_SEED", "1"))
# For each endpoint, valid and invalid ones.
EXAMPLES = int(os.environ.get("AZU_TEST_SCHEMA_EXAMPLES", "60"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
_PATIENCE_S = 60


@dataclass
class Served:
    """An ingress behind a real HTTP server, and one user of it."""

    url: str
    api_key: str
    address: str
    ingress: LocalIngress
    loop: asyncio.AbstractEventLoop
    statuses: Counter[int] = field(default_factory=Counter)

    def money(self) -> tuple[int, ...]:
        """Return what the user has, and what is reserved of it."""
        accounts = (user_available(self.address), user_reserved(self.address))
        asked = asyncio.run_coroutine_threadsafe(self.ingress.ledger.balances_of(*accounts), self.loop)
        return asked.result(_PATIENCE_S)


@contextmanager
def served(redis_url: str, home: Path) -> Iterator[Served]:
    """Serve an ingress from a thread of its own."""
    ready, done = threading.Event(), asyncio.Event()
    found: list[Served] = []

    async def serve() -> None:
        async with local_ingress(redis_url, home, unhurried()) as ingress:
            server = uvicorn.Server(
                uvicorn.Config(ingress.app, port=0, log_level="error", lifespan="off", ws="none")
            )
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            address, api_key = await ingress.user()
            url = f"http://127.0.0.1:{port}"
            found.append(Served(url, api_key, address, ingress, asyncio.get_running_loop()))
            ready.set()
            await done.wait()
            server.should_exit = True
            await serving

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(_PATIENCE_S)
    try:
        yield found[0]
    finally:
        found[0].loop.call_soon_threadsafe(done.set)
        thread.join(_PATIENCE_S)


def test_every_endpoint_keeps_to_the_schema_whatever_is_sent(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("deployments.receipts._SIGNATURE_TIMEOUT_S", 0.05)
    with served(redis_url, tmp_path) as here:
        schema = schemathesis.openapi.from_url(f"{here.url}/openapi.json")
        headers = {"authorization": f"Bearer {here.api_key}"}
        faults: list[str] = []
        for result in schema.get_all_operations():
            operation = result.ok()

            @hypothesis.seed(SEED)
            @settings(
                max_examples=EXAMPLES,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=[hypothesis.Phase.generate],
            )
            @hypothesis.given(
                case=operation.as_strategy() | operation.as_strategy(schemathesis.GenerationMode.NEGATIVE)
            )
            def send(case: schemathesis.Case) -> None:
                before = settled(here)
                response = case.call(headers=headers, timeout=_PATIENCE_S)
                here.statuses[response.status_code] += 1
                if response.status_code >= 400:
                    assert here.money() == before
                case.validate_response(response, checks=CHECKS, headers=headers)

            try:
                send()
            except Exception as fault:
                faults.append(f"{operation.label}: {str(fault)[:1500]}")
        total = sum(here.statuses.values())
    print(f"schemathesis: {total} requests, by status {dict(sorted(here.statuses.items()))}")
    assert faults == []
    assert here.statuses[200] > total / 20


def settled(here: Served) -> tuple[int, ...]:
    """Wait until nothing is reserved any more, and return the money."""
    for _ in range(1000):
        if (money := here.money())[1] == 0:
            return money
        threading.Event().wait(0.01)
    return here.money()
