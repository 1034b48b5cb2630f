"""Field types that settings and network files share, and how their errors are told."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from azu.chain.identifiers import parse_address
from azu.errors import AzuError, ConfigurationError
from azu.units import parse_bytes


def refused(error: ValidationError, where: str | None = None) -> ConfigurationError:
    """Return the error that names every key at fault; values stay out of it, they may be secret."""
    faults = {".".join(str(part) for part in fault["loc"]): fault["msg"] for fault in error.errors()}
    told = "; ".join(f"{key}: {message}" for key, message in faults.items())
    return ConfigurationError(f"{where}: {told}" if where else told, param=next(iter(faults)))


def _checked(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `parse` with its errors in the form that pydantic collects."""

    def check(value: Any) -> Any:
        try:
            return parse(value)
        except AzuError as error:
            raise ValueError(error.message) from error

    return check


Size = Annotated[int, BeforeValidator(_checked(parse_bytes))]
Address = Annotated[str, BeforeValidator(_checked(lambda value: parse_address(str(value))))]
Port = Annotated[int, Field(ge=0, le=65535)]
