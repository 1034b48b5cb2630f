"""What names a network: a hash of its platform's address, which may be replaced, and of its authority."""

import ssl
from dataclasses import dataclass
from hashlib import sha256

from pydantic import ConfigDict

from azu.errors import Unauthenticated

# 128 bits: too many to find another address and authority with the same ones.
ID_DIGITS = 32
# In the home of money: which key of the platform replaced which.
PLATFORMS_FILE = "platforms.json"


@dataclass(frozen=True, slots=True)
class Succession:
    """The platform `old` is `new` from now on; each signature, in hex, is of the address's own key."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    old: str
    new: str
    by_old: str
    by_new: str


def network_id(platform: str, authority_pem: str | None) -> str:
    """Return a network's id: 32 hex digits.

    `authority_pem` is the certificate of the authority that signed the ingress's certificate; None for a
    network without encryption and for one whose certificate the public authorities signed. Raises
    Unauthenticated for a text that is no certificate.
    """
    try:
        authority = b"" if authority_pem is None else ssl.PEM_cert_to_DER_cert(authority_pem)
    except ValueError as error:
        raise Unauthenticated("the network showed no certificate of its authority") from error
    return sha256(b"azu network\n" + platform.lower().encode() + b"\n" + authority).hexdigest()[:ID_DIGITS]
