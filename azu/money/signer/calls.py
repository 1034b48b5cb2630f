"""The calls of the signer's process in plain values, and `RemoteSigner`, its client."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import ConfigDict

from azu.contact import Contact
from azu.money.signer.views import Room, TransferRequest
from azu.money.wire import Remote

# Longer than the signer tries to read the chain before it signs.
_SILENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class SignerStatus:
    """What the signer's last look found.

    `findings` say why nothing is signed, empty if all agrees; they are red once several looks in a row had
    some. `day_parts` has the part of each kind's daily limit that was sent.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    findings: tuple[str, ...] = ()
    is_red: bool = False
    day_parts: Mapping[str, float] = field(default_factory=dict)


class SignerCalls:
    """The calls of the signer. Each raises Unavailable when it, the books or the chain do not answer.

    It is safe to make a call again with the same values.
    """

    async def transfer(self, asked: TransferRequest) -> str:
        """Return the signed action that sends a payout, for the chain to be posted as it is.

        Raises Unavailable while books and chain do not agree (code `nothing_signed`), and what the policy's
        `admit` does.
        """

    async def room(self) -> Room:
        """Return what the limits on withdrawals leave now; raises Unavailable as `transfer` does."""

    async def noop(self, nonce: int) -> str:
        """Return the signed action that uses up a payout's nonce; no transfer is signed under it any more.

        Raises Forbidden for a nonce that belongs to no payout.
        """

    async def certify(self, address: str) -> str:
        """Return the platform's signature, in hex, that receipts are signed by the key of this address.

        Raises Unavailable while books and chain do not agree, InvalidRequest for what is no address.
        """

    async def status(self) -> SignerStatus:
        """Return what the last look at books and chain found."""

    async def accept(self, text: str) -> None:
        """Go on with the books that an admin's signed command names, after a time without foreign transfers.

        Raises Forbidden for a text that no admin signed, that has expired or whose nonce is ahead of the
        chain's time, Conflict for a command that was used, or for books that do not have the entry that it
        names.
        """


class RemoteSigner(Remote, SignerCalls, calls=SignerCalls):
    """The signer's process, as one caller may use it; `url` has the caller's name and secret."""

    def __init__(self, url: str) -> None:
        super().__init__(url, Contact("the signer", "is"), silence_s=_SILENCE_S)
