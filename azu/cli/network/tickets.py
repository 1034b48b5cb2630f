"""Tickets: what `azu up` prints and `azu join` takes.

Whoever holds one can run code on every machine of the network.
"""

import base64
import binascii
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from azu.errors import ConfigurationError


class Ticket(BaseModel):
    """Where a network's Ray head is ("host:port") and the token that opens it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+:\d{1,5}$")]
    token: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    version: Literal[1] = 1

    def encode(self) -> str:
        """Return the ticket as one word."""
        return base64.urlsafe_b64encode(self.model_dump_json().encode()).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> "Ticket":
        """Return the ticket of a word that `encode` made; raises ConfigurationError for any other."""
        word = text.strip()
        try:
            content = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
            return cls.model_validate_json(content)
        except (binascii.Error, ValueError, ValidationError) as error:
            raise ConfigurationError(
                "the ticket is damaged or of another version of azu; copy it whole", param="ticket"
            ) from error
