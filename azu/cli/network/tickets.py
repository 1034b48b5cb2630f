"""Tickets: what `azu up` prints and `azu join` takes.

Whoever gets in with one can run code on every machine of the network.
"""

import base64
import binascii
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from azu.errors import ConfigurationError


class _Word(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    def encode(self) -> str:
        """Return the ticket as one word."""
        return base64.urlsafe_b64encode(self.model_dump_json().encode()).decode().rstrip("=")


class Ticket(_Word):
    """Where an unencrypted network's Ray head is ("host:port") and the token that opens it."""

    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+:\d{1,5}$")]
    token: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    version: Literal[1] = 1


class EnrolmentTicket(_Word):
    """Where an encrypted network lets nodes in, whose certificate that has to be, and a secret to show there.

    `authority_sha256` is the fingerprint of the network's certificate authority. The certificate of the
    ingress itself is that authority's or, if it is `publicly_trusted`, one that this machine's system trusts.
    """

    url: Annotated[str, Field(pattern=r"^https://[A-Za-z0-9.:\[\]-]+$", max_length=300)]
    authority_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    secret: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    publicly_trusted: bool = False
    version: Literal[2] = 2


AnyTicket = Ticket | EnrolmentTicket
_ANY: TypeAdapter[AnyTicket] = TypeAdapter(Annotated[AnyTicket, Field(discriminator="version")])


def decode_ticket(text: str) -> AnyTicket:
    """Return the ticket of a word that `encode` made; raises ConfigurationError for any other."""
    word = text.strip()
    try:
        content = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
        return _ANY.validate_json(content)
    except (binascii.Error, ValueError, ValidationError) as error:
        raise ConfigurationError(
            "the ticket is damaged or of another version of azu; copy it whole", param="ticket"
        ) from error
