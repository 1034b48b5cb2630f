"""What every call over HTTP needs: the answer's JSON or its error, and which certificates to trust."""

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from azu.errors import (
    AzuError,
    ConfigurationError,
    DeadlineExceeded,
    InternalError,
    Unavailable,
    error_classes,
)


def json_of(response: httpx.Response) -> Any:
    """Return the parsed body of a good response; raises the error that a refused one carries."""
    raise_for(response)
    try:
        return response.json()
    except ValueError as error:
        raise InternalError(
            f"{response.url.copy_with(query=None)} answered no JSON: is it a network of azu?"
        ) from error


def raise_for(response: httpx.Response) -> None:
    """Raise the error that a refused response carries; its body must have been read."""
    if response.is_error:
        raise error_of(response.status_code, response.content, str(response.url.copy_with(query=None)))


def error_of(status: int | None, content: bytes, url: str = "the network") -> AzuError:
    """Return the error of an OpenAI-shaped body, or an error that says that the body has another shape.

    `status` is None for an error inside a stream, which has no status of its own.
    """
    try:
        body = json.loads(content)["error"]
        message, param, code = str(body["message"]), body.get("param"), body.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        return _kind(status, None)(
            f"{url} answered {status or 'a stream'} without an error body: is it a network of azu?"
        )
    return _kind(status, code)(message, param=param, code=code)


def _kind(status: int | None, code: str | None) -> type[AzuError]:
    """Return the error class with a code, else the most general one with the status."""
    found = [kind for kind in error_classes() if status is None or kind.status == status]
    by_code = [kind for kind in found if code is not None and kind.default_code == code]
    if by_code:
        return by_code[0]
    return found[0] if found and status is not None else Unavailable


@contextmanager
def translated() -> Iterator[None]:
    """Raise httpx's errors as DeadlineExceeded and Unavailable, which name the URL."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise DeadlineExceeded(f"{_asked(error)} did not answer in time") from error
    except httpx.ConnectError as error:
        url = _asked(error)
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            told = f"the certificate of {url} is not trusted: `azu login URL#ID`, as `azu up` printed it"
        else:
            told = f"no network answers at {url}: `azu up` starts one here, AZU_URL names another one"
        raise Unavailable(told) from error
    except httpx.TransportError as error:
        raise Unavailable(f"{_asked(error)} cannot be reached: {error}") from error


def _asked(error: httpx.RequestError) -> str:
    url = error.request.url
    return f"{url.scheme}://{url.netloc.decode()}"


def trusting(authority: Path | str) -> ssl.SSLContext:
    """Return a context that trusts the authority in a file beside the public ones.

    Raises ConfigurationError for a file without a certificate.
    """
    context = httpx.create_ssl_context()
    try:
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"{authority} holds no certificate: {error}", param="AZU_TLS_CA") from error
    return context


def trusting_only(authority_pem: str) -> ssl.SSLContext:
    """Return a context that trusts one authority's certificates alone."""
    return ssl.create_default_context(cadata=authority_pem)


def trusting_this(certificate: Path) -> ssl.SSLContext:
    """Return a context that trusts the certificate in a file of this machine, at any address."""
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
