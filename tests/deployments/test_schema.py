"""schemathesis over the ingress's own OpenAPI document: each answer has the body that is documented."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from huggingface_hub import constants
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.deployments.served import Served, served

SEED = int(os.environ.get("AZU_TEST_SEED", "1"))
# For each operation, valid and invalid ones.
EXAMPLES = int(os.environ.get("AZU_TEST_SCHEMA_EXAMPLES", "60"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
_PATIENCE_S = 300


@pytest.fixture
def here(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with served(redis_url, tmp_path) as running:
        yield running


@pytest.mark.prove
def test_every_answer_fits_the_schema_for_valid_and_invalid_requests(here: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{here.url}/openapi.json", timeout=_PATIENCE_S)
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
            response = case.call(headers=keys(here), timeout=_PATIENCE_S)
            here.statuses[response.status_code] += 1
            if response.status_code >= 400:
                assert here.money() == before
            case.validate_response(response, checks=CHECKS, headers=keys(here))

        try:
            send()
        except Exception as fault:
            faults.append(f"{operation.label}: {str(fault)[:1500]}")
    total = sum(here.statuses.values())
    print(f"schemathesis: {total} requests, by status {dict(sorted(here.statuses.items()))}")
    assert faults == []
    assert here.statuses[200] > total / 20


TEXT = {"model": "azu/tiny-dense", "prompt": "Hello", "max_tokens": 3}
CHAT = {"model": "azu/tiny-dense", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}


ANSWERS: list[tuple[str, str, dict[str, Any], str]] = [
    ("GET", "/v1/balance", {}, "reserved_lamports"),
    ("GET", "/v1/network", {}, "deployments"),
    ("GET", "/v1/models", {}, "lamports_per_token"),
    ("GET", "/health", {}, "status"),
    ("GET", "/v1/receipts/{job_id}", {"path_parameters": {"job_id": "job-none"}}, "code"),
    ("POST", "/v1/completions", {"body": TEXT}, "finish_reason"),
    ("POST", "/v1/completions", {"body": TEXT}, "prompt_tokens"),
    ("POST", "/v1/completions", {"body": TEXT | {"stream": True}}, "created"),
    ("POST", "/v1/chat/completions", {"body": CHAT}, "content"),
    ("POST", "/v1/chat/completions", {"body": CHAT | {"stream": True}}, "delta"),
]


@pytest.mark.prove
def test_an_answer_that_lacks_a_field_fails(here: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{here.url}/openapi.json", timeout=_PATIENCE_S)
    for method, path, sent, field in ANSWERS:
        case = schema[path][method].Case(**sent)
        whole, lacking = (case.call(headers=keys(here), timeout=_PATIENCE_S) for _ in range(2))
        lacking.content = without(lacking.content, field)

        case.validate_response(whole, checks=CHECKS, headers=keys(here))
        # Of an event the failure says that it is none of the documented kinds.
        with pytest.raises(FailureGroup, match="anyOf" if "stream" in str(sent) else field):
            case.validate_response(lacking, checks=CHECKS, headers=keys(here))


def without(content: bytes, name: str) -> bytes:
    """Return JSON, or events of JSON, without one field, wherever it is."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(one) for key, one in value.items() if key != name}
        return [cut(one) for one in value] if isinstance(value, list) else value

    lines = content.decode().split("\n")
    parsed = [line.removeprefix("data: ") for line in lines]
    spoilt = [json.dumps(cut(json.loads(line))) if line.startswith("{") else line for line in parsed]
    return "\n".join(
        ("data: " if line.startswith("data: ") else "") + one for line, one in zip(lines, spoilt, strict=True)
    ).encode()


def keys(here: Served) -> dict[str, str]:
    """Return the headers that carry the user's key."""
    return {"authorization": f"Bearer {here.api_key}"}


def settled(here: Served) -> tuple[int, ...]:
    """Wait until nothing is reserved any more, and return the money."""
    for _ in range(1000):
        if (money := here.money())[1] == 0:
            return money
        threading.Event().wait(0.01)
    return here.money()
