"""The bases of the HTTP contract: requests are strict, answers are lenient, every error has one shape."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from azu.errors import InternalError, plain_fault

T = TypeVar("T")
Response = TypeVar("Response", bound="ResponseModel")


class RequestModel(BaseModel):
    """What a caller sends. Unknown keys are refused, and no value is converted to another type."""

    # A client imports all models and needs few.
    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)


class ResponseModel(BaseModel):
    """What the network answers: a route builds it and the client parses it.

    A client may be older than the network, so it ignores keys that it does not know.
    """

    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        # A route may build an answer from a domain object that has the same fields.
        from_attributes=True,
        defer_build=True,
        # The network always sends a field that has a default; the default is for older networks.
        json_schema_serialization_defaults_required=True,
    )


# A field that the JSON leaves out while it is None.
OrAbsent = Annotated[T | None, Field(exclude_if=lambda value: value is None)]


class ErrorDetail(ResponseModel):
    """OpenAI's error object; `param` names the field that is at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(ResponseModel):
    """The body of every refused request."""

    error: ErrorDetail


class Revoked(ResponseModel):
    """The id of the API key or ticket that is invalid from now on."""

    revoked: str


def read(kind: type[Response], body: Any) -> Response:
    """Return a model from parsed JSON; raises InternalError for an answer of another shape."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        place, fault = plain_fault(error.errors())
        raise InternalError(f"the network's answer has another shape: {place}: {fault}") from error
