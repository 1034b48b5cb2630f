"""docs/api.md, written from the API's OpenAPI document: `python -m deployments.reference > docs/api.md`."""

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from azu.errors import error_classes
from deployments.ingress import contract

Schema = Mapping[str, Any]

_INTRODUCTION = """\
# The HTTP API

`python -m deployments.reference > docs/api.md` writes this page from the models in `azu/api`. A running
network serves the same at `/docs` (Swagger UI) and `/openapi.json`.

A caller sends its key as `Authorization: Bearer KEY`. "API key" is a key that `azu login` or
`POST /v1/auth/keys` opened; "admin key" is the key of the network's owner. Requests are JSON; a field that an
operation does not have is refused. Answers may get more fields in later versions. Amounts are whole lamports:
one HYPE is 100,000,000 lamports.

The caller makes the key itself and sends its hash; the network never has it before it is used. With curl:

    KEY=azu-sk-$(openssl rand -base64 32 | tr '+/' '-_' | tr -d '=')
    HASH=$(printf %s "$KEY" | sha256sum | cut -d' ' -f1)
    JSON='Content-Type: application/json'
    curl $AZU_URL/v1/auth/challenge -H "$JSON" -d '{"address": "0xYOURS", "key_sha256": "'$HASH'"}'
    curl $AZU_URL/v1/auth/keys -H "$JSON" -d '{"nonce": "NONCE", "signature": "0xSIGNATURE"}'

Between the two calls the wallet signs the first one's `message` (`personal_sign`). After them `$KEY` is a
key.

Each answer has the header `x-request-id`: the caller's own if the request had a usable one, else a new one.
Where a network is too busy for a caller, `retry-after` is the number of seconds to wait. An answer with
`x-should-retry: false` may have been charged: a client does not repeat the request by itself. A stream has
its job's id in `x-job-id`.

A job costs (prompt tokens + completion tokens) x layers x the price of a token in a layer. The prompt counts
once, however many answers (`n`) are asked for. What azu ends with an error before the first token costs
nothing. A client that closes the connection itself before the first token pays for the prompt tokens that ran
until then, and after it for the prompt and the tokens so far. Work that azu does again after a fault is never
charged.

A job whose client hangs up stops as soon as azu hears of it, and waits for 10 minutes with its
reservation (`limits.repeat_within_s` of the network file). The same request under the same key within that
time goes on with this job: it reads the answer from its beginning, whole or as a stream, and nothing is
reserved or paid a second time, also not what has to be computed again. So a client that repeats a request by
itself, after a timeout or a broken connection, pays once. A request is the same if its body is, or if both
have the same `Idempotency-Key` header. Equal requests whose clients are all connected are jobs of their own,
and so is a request after the whole answer. If the account needs the money or the place of a job that waits,
that job ends first. `POST /v1/jobs/{job_id}/cancel` ends a job at once. A job goes on 8 times at most.
"""
_CALLERS = {"ApiKey": "API key", "AdminKey": "admin key"}
_BOUNDS = (
    ("minimum", "at least {}"), ("exclusiveMinimum", "more than {}"), ("maximum", "at most {}"),
    ("exclusiveMaximum", "less than {}"), ("minLength", "at least {} characters"),
    ("maxLength", "at most {} characters"), ("minItems", "at least {} items"),
    ("maxItems", "at most {} items"), ("pattern", "matches `{}`"),
)  # fmt: skip


def reference(document: Schema) -> str:
    """Return the page for an OpenAPI document."""
    blocks = [_INTRODUCTION, _contents(document)]
    group = None
    for path, method, operation in _operations(document):
        if operation["tags"] != group:
            group = operation["tags"]
            blocks.append(f"## {group[0]}\n")
        blocks.append(_operation(path, method, operation))
    blocks.append(_errors())
    blocks.append("## Bodies\n")
    blocks += [_model(name, model) for name, model in sorted(document["components"]["schemas"].items())]
    return "\n".join(blocks)


def _operations(document: Schema) -> Iterator[tuple[str, str, Schema]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def _contents(document: Schema) -> str:
    rows = ["| Operation | Caller | Answer |", "|---|---|---|"]
    for path, method, operation in _operations(document):
        link = f"[{method} {path}](#{_anchor(f'{method} {path}')})"
        rows.append(f"| {link} | {_caller(operation)} | {_answer(operation)} |")
    return "\n".join(rows) + "\n"


def _operation(path: str, method: str, operation: Schema) -> str:
    lines = [f"### {method} {path}\n", f"{operation['description']}\n", f"- Caller: {_caller(operation)}"]
    for parameter in operation.get("parameters", ()):
        need = (
            "required"
            if parameter.get("required")
            else f"default {_value(parameter['schema'].get('default'))}"
        )
        kind = _type(parameter["schema"])
        lines.append(f"- `{parameter['name']}` in the {parameter['in']}: {kind}; {need}")
    if body := operation.get("requestBody"):
        lines.append(f"- Request: {_type(body['content']['application/json']['schema'])}")
    lines.append(f"- Answer: {_answer(operation)}")
    others = [
        f"{status}: {_content(response)}"
        for status, response in operation["responses"].items()
        if status.isdigit() and status not in ("200", "422")
    ]
    lines.append("; ".join(["- Errors: 4XX and 5XX: [ErrorBody](#errorbody)", *others]))
    return "\n".join(lines) + "\n"


def _caller(operation: Schema) -> str:
    keys = [_CALLERS[name] for one in operation.get("security", ()) for name in one]
    return " or ".join(keys) or "anyone"


def _answer(operation: Schema) -> str:
    return _content(operation["responses"]["200"])


def _content(response: Schema) -> str:
    return "; ".join(_body(kind, content["schema"]) for kind, content in response["content"].items())


def _body(media_type: str, schema: Schema) -> str:
    if media_type == "application/json":
        return _type(schema)
    if media_type == "text/event-stream":
        event, _ = schema["anyOf"]
        return f"events: {_type(event['properties']['data']['contentSchema'])}, then `[DONE]`"
    return "text"


def _errors() -> str:
    rows = [
        "## Errors\n",
        "Every refused request gets an [ErrorBody](#errorbody) with OpenAI's fields. A stream that fails has",
        "it as its last event before `[DONE]`.\n",
        "| Status | `type` | `code` |",
        "|---|---|---|",
    ]
    kinds = {(kind.status, kind.type, kind.default_code) for kind in error_classes()}
    rows += [f"| {status} | {kind} | {code or ''} |" for status, kind, code in sorted(kinds, key=str)]
    return "\n".join(rows) + "\n"


def _model(name: str, model: Schema) -> str:
    lines = [
        f"### {name}\n",
        f"{model.get('description', '')}\n",
        "| Field | Type | Optional |",
        "|---|---|---|",
    ]
    required = model.get("required", ())
    for field, schema in model.get("properties", {}).items():
        default = schema.get("default")
        optional = "yes" if default is None else f"default {_value(default)}"
        lines.append(f"| `{field}` | {_type(schema)} | {'' if field in required else optional} |")
    return "\n".join(lines) + "\n"


def _type(schema: Schema) -> str:
    """Return a JSON schema in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{_anchor(name)})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if "const" in schema or "enum" in schema:
        return " or ".join(map(_value, schema.get("enum", [schema.get("const")])))
    kind = schema.get("type", "any")
    if "prefixItems" in schema:
        return f"[{', '.join(map(_type, schema['prefixItems']))}]"
    if kind == "array":
        kind = f"list of {_type(schema['items'])}" if "items" in schema else "list"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        kind = f"map to {_type(schema['additionalProperties'])}"
    bounds = [words.format(_number(schema[key])) for key, words in _BOUNDS if key in schema]
    return (f"{kind} ({', '.join(bounds)})" if bounds else kind).replace("|", "\\|")


def _number(bound: Any) -> str:
    # The document holds bounds as doubles.
    return str(bound) if isinstance(bound, str) else f"{bound:,.10g}"


def _value(value: Any) -> str:
    return f'`"{value}"`' if isinstance(value, str) else f"`{str(value).lower().replace('none', 'null')}`"


def _anchor(heading: str) -> str:
    """Return the anchor that a heading has on a forge's page."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    sys.stdout.write(reference(contract()))
