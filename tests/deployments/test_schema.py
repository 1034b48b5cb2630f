"""schemathesis over the ingress's own OpenAPI schema, over HTTP: nothing breaks, errors have one shape."""

import os
import threading
from pathlib import Path

import hypothesis
import pytest
import schemathesis
from huggingface_hub import constants
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.deployments.served import Served, served

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


def test_every_endpoint_keeps_to_the_schema_whatever_is_sent(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("deployments.jobs._SIGNATURE_TIMEOUT_S", 0.05)
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
