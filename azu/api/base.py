"""What the client returns: frozen values, read from the ingress's JSON."""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from azu.errors import InternalError

# A client may be older than the server: what it does not know yet is no error.
_LENIENT = ConfigDict(extra="ignore")
T = TypeVar("T")


def read(kind: type[T], body: Any) -> T:
    """Return a value of a kind from parsed JSON; raises InternalError for an answer of another shape."""
    try:
        return TypeAdapter(kind).validate_python(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InternalError(f"the answer is no {kind.__name__}: {place}: {first['msg']}") from error


class _Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every refused request gets."""

    error: _Error
