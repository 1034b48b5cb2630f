"""Whom a client of an encrypted network trusts."""

import ssl
from hashlib import sha256
from pathlib import Path

import httpx

from azu.errors import ConfigurationError, Unauthenticated


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
