"""The ingress's answers that are errors, as the errors they were."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from azu.errors import AzuError, DeadlineExceeded, Unavailable, kinds


def error_of(status: int | None, content: bytes) -> AzuError:
    """Return the error that an OpenAI-shaped body says, or one that says its body is not of that shape.

    An error inside a stream has no status of its own.
    """
    try:
        said = json.loads(content)["error"]
        message, param, code = str(said["message"]), said.get("param"), said.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        return _kind(status, None)(f"the network answered {status or 'a stream'} without an error body")
    return _kind(status, code)(message, param=param, code=code)


def raise_for(response: httpx.Response) -> None:
    """Raise the error of a response that is one; its body must have been read."""
    if response.is_error:
        raise error_of(response.status_code, response.content)


def _kind(status: int | None, code: str | None) -> type[AzuError]:
    """Return the class with that code, else the most general one with that status."""
    found = [kind for kind in kinds() if status is None or kind.status == status]
    by_code = [kind for kind in found if code is not None and kind.default_code == code]
    if by_code:
        return by_code[0]
    return found[0] if found and status is not None else Unavailable


@contextmanager
def translated() -> Iterator[None]:
    """Turn httpx's errors into ours."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise DeadlineExceeded("the network did not answer in time") from error
    except httpx.TransportError as error:
        raise Unavailable(f"the network cannot be reached: {error}") from error
