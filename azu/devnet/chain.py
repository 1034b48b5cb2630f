"""The devnet's chain without HTTP or a clock: tokens, balances, nonces, signed actions and ledger rows.

Amounts are integers of 10^-8, the smallest amount of every token here.
"""

import json
import secrets
from bisect import insort
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from azu.clock import DAY_MS
from azu.errors import InvalidRequest
from azu.money.chain.actions import recover_signer
from azu.money.chain.networks import DEVNET_HYPE
from azu.units import hype_from_lamports, lamports_from_hype

ACTIVATION_FEE = 10**8
_KEPT_NONCES = 100
_ZERO_HASH = f"0x{0:064x}"
_OK: Mapping[str, Any] = {"status": "ok", "response": {"type": "default"}}

Address = Annotated[str, Field(pattern="^0x[0-9a-fA-F]{40}$")]
Amount = Annotated[str, Field(pattern=r"^\d{1,12}(\.\d{1,8})?$")]
Nonce = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the devnet. `full_id` ("NAME:0x...") and `index` are unique, the name is not."""

    full_id: str
    index: int

    @property
    def name(self) -> str:
        """The name; another token may have the same."""
        return self.full_id.split(":")[0]


HYPE = Token(DEVNET_HYPE, 150)
USDC = Token("USDC:0x6d1e7cde53ba9467b783cb7c530ce054", 0)
SECOND_HYPE = Token("HYPE:0xfa15e000fa15e000fa15e000fa15e000", 666)


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, frozen=True)


class _UserSigned(_Wire):
    signature_chain_id: str
    hyperliquid_chain: Literal["Mainnet", "Testnet"]


class SendAsset(_UserSigned):
    """A transfer between accounts that every account mode allows."""

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
        """The nonce, which is named `time` on the wire."""
        return self.time


class SetAbstraction(_UserSigned):
    """An action that switches the signer's account between separate and unified balances."""

    type: Literal["userSetAbstraction"]
    user: Address
    abstraction: Literal["disabled", "unifiedAccount", "portfolioMargin"]
    nonce: Nonce


class Noop(_Wire):
    """An action that only uses up a nonce."""

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


class Nonces:
    """The highest nonces that one signer has used."""

    def __init__(self) -> None:
        self._used: list[int] = []

    def refusal(self, nonce: int, now_ms: int) -> str | None:
        """Return why a nonce cannot be used, in the chain's words, or None if it can."""
        if not now_ms - 2 * DAY_MS < nonce < now_ms + DAY_MS:
            return f"Invalid nonce: {nonce} is outside of the window around {now_ms}"
        if nonce in self._used:
            return f"Invalid nonce: duplicate nonce {nonce}"
        if len(self._used) == _KEPT_NONCES and nonce < self._used[0]:
            return f"Invalid nonce: nonce too low {nonce} < {self._used[0]}"
        return None

    def use(self, nonce: int) -> None:
        """Record that a nonce is used up."""
        insort(self._used, nonce)
        del self._used[:-_KEPT_NONCES]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of an account's ledger; no answer contains it before `visible_at_ms`."""

    time_ms: int
    hash: str
    delta: Mapping[str, Any]
    visible_at_ms: int


class Refused(Exception):
    """The chain refused an action; the message is its answer."""


class DevnetState:
    """The state of the chain, which one request after the other changes."""

    def __init__(self) -> None:
        self.tokens = {token.full_id: token for token in (HYPE, USDC)}
        self.rows: dict[str, list[Row]] = defaultdict(list)
        self.txs: dict[str, dict[str, Any]] = {}
        self.unified: set[str] = set()
        self.requests_used: dict[str, int] = defaultdict(int)
        self.last_ms = 0
        self._balances: dict[str, dict[str, int]] = {}
        self._nonces: dict[str, Nonces] = defaultdict(Nonces)

    def new_hash(self) -> str:
        """Return a hash that no transaction has: a new devnet repeats none that an existing ledger knows."""
        return f"0x{secrets.token_hex(32)}"

    def exists(self, address: str) -> bool:
        """Return whether the account was ever paid, and not emptied since."""
        return address in self._balances

    def balance(self, address: str, token: Token) -> int:
        """Return an account's balance of a token."""
        return self._balances.get(address, {}).get(token.full_id, 0)

    def fund(self, address: str, token: Token, amount: int, now_ms: int) -> str:
        """Create an amount of a token; returns the hash of the transaction."""
        self._credit(address, token, amount)
        delta = {"type": "spotGenesis", "token": token.name, "amount": decimal(amount)}
        return self._record({address: delta}, {"type": "spotGenesis"}, address, now_ms, now_ms)

    def send_from_contract(
        self, sender: str, destination: str, token: Token, amount: int, count: int, now_ms: int
    ) -> None:
        """Make new money and have a contract of HyperEVM send it, `count` times within one millisecond.

        No action and no hash belongs to such rows.
        """
        for _ in range(count):
            self._credit(destination, token, amount)
            delta = {
                "type": "spotTransfer",
                "user": sender,
                "destination": destination,
                "token": token.name,
                "amount": decimal(amount),
            }
            self.rows[destination].append(Row(now_ms, _ZERO_HASH, delta, now_ms))
        self.last_ms = now_ms

    def execute(
        self,
        request: ExchangeRequest,
        signer: str,
        raw: Mapping[str, Any],
        now_ms: int,
        *,
        rows_late_ms: int = 0,
    ) -> Mapping[str, Any]:
        """Carry out a signed action or refuse it; returns the chain's answer in both cases.

        A valid nonce is used up even if the action then fails.
        """
        try:
            self._admit(request, signer, now_ms)
        except Refused as refusal:
            return {"status": "err", "response": str(refusal)}
        self.requests_used[signer] += 1
        try:
            deltas = self._perform(request, signer)
        except Refused as refusal:
            self._record({}, raw, signer, now_ms, now_ms, error=str(refusal))
            return {"status": "err", "response": str(refusal)}
        self._record(deltas, raw, signer, now_ms, now_ms + rows_late_ms)
        self._forget_if_empty(signer)
        return _OK

    def _admit(self, request: ExchangeRequest, signer: str, now_ms: int) -> None:
        action = request.action
        if not isinstance(action, Noop):
            if action.hyperliquid_chain != "Testnet":
                raise Refused("Wrong chain: this is not the mainnet")
            if action.nonce != request.nonce:
                raise Refused("Nonce mismatch")
        if not self.exists(signer):
            raise Refused(f"Must deposit before performing actions. User: {signer}")
        if request.expires_after is not None and now_ms > request.expires_after:
            raise Refused("Action expired")
        refusal = self._nonces[signer].refusal(request.nonce, now_ms)
        if refusal is not None:
            raise Refused(refusal)
        self._nonces[signer].use(request.nonce)

    def _perform(self, request: ExchangeRequest, signer: str) -> dict[str, Mapping[str, Any]]:
        """Change the balances; returns the rows to write by account."""
        match request.action:
            case Noop():
                return {}
            case SetAbstraction(user=user, abstraction=abstraction):
                if user.lower() != signer:
                    raise Refused("Only the account itself may change its mode")
                (self.unified.discard if abstraction == "disabled" else self.unified.add)(signer)
                return {}
            case SpotSend():
                if signer in self.unified:
                    raise Refused("Action disabled when unified account is active")
                return self._transfer(request.action, signer, {"type": "spotTransfer"}, request.nonce)
            case SendAsset(source_dex=source, destination_dex=destination):
                if (source, destination) != ("spot", "spot"):
                    raise Refused("The devnet moves spot balances only")
                kind = {"type": "send", "sourceDex": source, "destinationDex": destination}
                return self._transfer(request.action, signer, kind, request.nonce)

    def _transfer(
        self, action: SendAsset | SpotSend, sender: str, kind: Mapping[str, Any], nonce: int
    ) -> dict[str, Mapping[str, Any]]:
        token, amount = self.tokens.get(action.token), lamports_from_hype(action.amount)
        destination = action.destination.lower()
        if token is None:
            raise Refused(f"Unknown token {action.token}")
        if destination == sender or amount == 0:
            raise Refused("Cannot self-transfer or transfer nothing")
        fee = 0 if self.exists(destination) else ACTIVATION_FEE
        if self.balance(sender, token) < amount + (fee if token == USDC else 0):
            raise Refused("Insufficient balance for token transfer")
        if self.balance(sender, USDC) < fee:
            raise Refused("Insufficient USDC balance to activate the destination account")
        self._credit(sender, token, -amount)
        self._credit(sender, USDC, -fee)
        self._credit(destination, token, amount)
        delta = {
            **kind,
            "user": sender,
            "destination": destination,
            "token": token.name,
            "amount": decimal(amount),
            "usdcValue": "0.0",
            "fee": decimal(fee),
            "nativeTokenFee": "0.0",
            "nonce": nonce,
            "feeToken": "USDC" if fee else "",
        }
        return {sender: delta, destination: delta}

    def _credit(self, address: str, token: Token, amount: int) -> None:
        held = self._balances.setdefault(address, {})
        held[token.full_id] = held.get(token.full_id, 0) + amount
        assert held[token.full_id] >= 0, "checked before"

    def _record(
        self,
        deltas: Mapping[str, Mapping[str, Any]],
        action: Mapping[str, Any],
        user: str,
        now_ms: int,
        visible_at_ms: int,
        *,
        error: str | None = None,
    ) -> str:
        tx_hash = self.new_hash()
        self.last_ms = now_ms
        self.txs[tx_hash] = {
            "time": now_ms,
            "user": user,
            "action": dict(action),
            "block": len(self.txs) + 1,
            "hash": tx_hash,
            "error": error,
        }
        for address, delta in deltas.items():
            self.rows[address].append(Row(now_ms, tx_hash, delta, visible_at_ms))
        return tx_hash

    def _forget_if_empty(self, address: str) -> None:
        # As on the real chain: an account without any balance disappears together with its ledger.
        if not any(self._balances[address].values()):
            del self._balances[address]
            self.rows.pop(address, None)


def decimal(amount: int) -> str:
    """Return an amount as the chain writes it: "5.0", "0.00000001"."""
    text = hype_from_lamports(amount)
    return text if "." in text else f"{text}.0"
