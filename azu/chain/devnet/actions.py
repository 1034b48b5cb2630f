"""What POST /exchange may carry: the actions that the devnet knows."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from azu.chain.hyperliquid import recover_signer
from azu.errors import InvalidRequest

Address = Annotated[str, Field(pattern="^0x[0-9a-fA-F]{40}$")]
Amount = Annotated[str, Field(pattern=r"^\d{1,12}(\.\d{1,8})?$")]
Nonce = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, frozen=True)


class _UserSigned(_Wire):
    signature_chain_id: str
    hyperliquid_chain: Literal["Mainnet", "Testnet"]


class SendAsset(_UserSigned):
    """A transfer between accounts, allowed in every account mode."""

    type: Literal["sendAsset"]
    destination: Address
    source_dex: str
    destination_dex: str
    token: str
    amount: Amount
    from_sub_account: Literal[""]
    nonce: Nonce


class SpotSend(_UserSigned):
    """A transfer between accounts that unified accounts refuse."""

    type: Literal["spotSend"]
    destination: Address
    token: str
    amount: Amount
    time: Nonce

    @property
    def nonce(self) -> int:
        """The nonce; it has another name on the wire."""
        return self.time


class SetAbstraction(_UserSigned):
    """Switches the signer's account between separate and unified balances."""

    type: Literal["userSetAbstraction"]
    user: Address
    abstraction: Literal["disabled", "unifiedAccount", "portfolioMargin"]
    nonce: Nonce


class Noop(_Wire):
    """Uses up a nonce."""

    type: Literal["noop"]


Action = SendAsset | SpotSend | SetAbstraction | Noop


class _Signature(_Wire):
    r: str
    s: str
    v: int


class ExchangeRequest(_Wire):
    """The body of POST /exchange."""

    action: Annotated[Action, Field(discriminator="type")]
    nonce: Nonce
    signature: _Signature
    vault_address: None = None
    expires_after: Annotated[int, Field(strict=True)] | None = None


_REQUEST = TypeAdapter(ExchangeRequest)


def parse_exchange(body: bytes) -> tuple[ExchangeRequest, str, dict[str, Any]]:
    """Return the request, the address that signed it and its action as it was sent.

    Raises InvalidRequest for anything malformed.
    """
    try:
        request = _REQUEST.validate_json(body)
    except ValidationError as error:
        raise InvalidRequest("Failed to deserialize the JSON body into the target type") from error
    raw: dict[str, Any] = json.loads(body)
    return request, recover_signer(raw, is_mainnet=False), raw["action"]
