"""The ingress's answers that are errors, as the errors they were."""

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import httpx

from azu.errors import (
    AzuError,
    ConfigurationError,
    DeadlineExceeded,
    Unauthenticated,
    Unavailable,
    error_classes,
)


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
    found = [kind for kind in error_classes() if status is None or kind.status == status]
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


def trusting(authority: Path | str) -> ssl.SSLContext:
    """Return a context that trusts an authority's certificate file beside those that everybody trusts."""
    context = httpx.create_ssl_context()
    try:
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"{authority} holds no certificate: {error}", param="AZU_TLS_CA") from error
    return context


def trusting_only(authority_pem: str) -> ssl.SSLContext:
    """Return a context that trusts what one authority signed and nothing else."""
    return ssl.create_default_context(cadata=authority_pem)


def trusting_this(certificate: Path) -> ssl.SSLContext:
    """Return a context for whoever shows the certificate in a file of this machine, at whatever address."""
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def fingerprint(pem: str) -> str:
    """Return the SHA-256 of a certificate in hex; raises Unauthenticated when it is none."""
    try:
        return sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
    except ValueError as error:
        raise Unauthenticated("the network showed no certificate of its authority") from error
