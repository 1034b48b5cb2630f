"""The OpenAPI document: answers that a route cannot declare by its return type.

The answers of streams are documented as `text/event-stream` with the schema of one event.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from azu.api.base import ErrorBody, ResponseModel
from azu.api.openai import ChatChunk, TextChunk

Documented = dict[int | str, dict[str, Any]]

_REF = "#/components/schemas/{model}"
_DONE = {"type": "object", "properties": {"data": {"type": "string", "const": "[DONE]"}}}


def plain_text() -> Documented:
    """Return the `responses` of a route that answers with plain text."""
    return {200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Plain text"}}


def stream_of(*chunks: type[ResponseModel]) -> Documented:
    """Return the `responses` of a route that streams one of these kinds of chunks."""
    models: list[type[ResponseModel]] = [*chunks, ErrorBody]
    kinds = [{"$ref": _REF.format(model=model.__name__)} for model in models]
    # The same form as FastAPI's own for the event streams that it makes.
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {
        200: {
            "content": {"text/event-stream": {"schema": {"anyOf": [event, _DONE]}}},
            "description": "The chunks of the answer, or an error, then [DONE]",
        }
    }


def whole_or_stream(whole: type[ResponseModel], chunk: type[ResponseModel]) -> Documented:
    """Return the `responses` of a route that answers in one piece, or as a stream if `stream` is true."""
    description = f"{whole.__name__}, or with `stream` its chunks, each an event, then [DONE]"
    return {200: stream_of(chunk)[200] | {"model": whole, "description": description}}


def openapi_of(api: FastAPI) -> dict[str, Any]:
    """Return an app's OpenAPI document with the models of its streams, which FastAPI does not collect."""
    if api.openapi_schema is None:
        document = get_openapi(
            title=api.title, version=api.version, description=api.description, routes=api.routes
        )
        _, definitions = models_json_schema(
            [(ChatChunk, "serialization"), (TextChunk, "serialization")], ref_template=_REF
        )
        document["components"]["schemas"] |= definitions["$defs"]
        api.openapi_schema = document
    return api.openapi_schema
