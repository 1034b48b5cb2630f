"""What the chain answers, as values; the only place that knows the shape of its JSON.

Keys that azu does not use are ignored: the chain adds some from time to time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from azu.errors import ChainError

_TRANSFERS = ("send", "spotTransfer")
_SPOT = "spot"
_T = TypeVar("_T")

Lower = Annotated[str, BeforeValidator(lambda text: text.lower() if isinstance(text, str) else text)]


@dataclass(frozen=True, slots=True)
class LedgerTransfer:
    """One transfer in an account's ledger. `token_name` is not unique and proves nothing.

    `amount` is the decimal string of the chain. `nonce` is the one that the sender signed, where known.
    """

    time_ms: int
    hash: str
    sender: str
    destination: str
    token_name: str
    amount: str
    to_spot: bool
    nonce: int | None


@dataclass(frozen=True, slots=True)
class TxDetails:
    """What the explorer knows of a hash: `error` is None if the action was carried out."""

    hash: str
    time_ms: int
    user: str
    action: Mapping[str, Any]
    error: str | None


@dataclass(frozen=True, slots=True)
class Destination:
    """What a transfer to an account meets: a new account costs the sender a fee in another token."""

    exists: bool
    sanctioned: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """The chain's words for not carrying out an action, at this time of asking."""

    reason: str

    @property
    def nonce_used(self) -> bool:
        """Whether an action with this nonce was admitted before, maybe this very one.

        No other with the same nonce will be.
        """
        return "duplicate nonce" in self.reason or "nonce too low" in self.reason

    @property
    def no_account(self) -> bool:
        """Whether the chain does not know the sender: it was never paid anything, or was emptied."""
        return self.reason.startswith("Must deposit")


class _Reply(BaseModel):
    model_config = ConfigDict(extra="ignore", alias_generator=to_camel)


class LedgerRow(_Reply):
    """One line of userNonFundingLedgerUpdates, of any kind."""

    time: int
    hash: Lower
    delta: dict[str, Any]

    @property
    def transfer(self) -> LedgerTransfer | None:
        """The line as a transfer, None if it is of another kind; raises ChainError if it is damaged."""
        if self.delta.get("type") not in _TRANSFERS:
            return None
        delta = _parse(_DELTA, self.delta)
        return LedgerTransfer(
            time_ms=self.time,
            hash=self.hash,
            sender=delta.user,
            destination=delta.destination,
            token_name=delta.token,
            amount=delta.amount,
            to_spot=delta.destination_dex == _SPOT,
            nonce=delta.nonce,
        )


class _Delta(_Reply):
    user: Lower
    destination: Lower
    token: str
    amount: str
    destination_dex: str = _SPOT  # a spotTransfer does not say
    nonce: int | None = None


class _Details(_Reply):
    time: int
    user: Lower
    action: dict[str, Any]
    hash: Lower
    error: str | None


class _TxReply(_Reply):
    tx: _Details | None = None


class _Balance(_Reply):
    token: int
    total: str


class _Balances(_Reply):
    balances: list[_Balance]


class _Token(_Reply):
    name: str
    index: int
    token_id: str


class _SpotMeta(_Reply):
    tokens: list[_Token]


class _TransferCheck(_Reply):
    user_exists: bool
    is_sanctioned: bool


class _RateLimit(_Reply):
    n_requests_used: int
    n_requests_cap: int


class _Accepted(_Reply):
    status: Literal["ok"]
    response: dict[str, Any]


class _Refused(_Reply):
    status: Literal["err"]
    response: str


_ROWS = TypeAdapter(list[LedgerRow])
_DELTA = TypeAdapter(_Delta)
_TX = TypeAdapter(_TxReply)
_BALANCES = TypeAdapter(_Balances)
_SPOT_META = TypeAdapter(_SpotMeta)
_CHECK = TypeAdapter(_TransferCheck)
_LIMIT = TypeAdapter(_RateLimit)
_ANSWER: TypeAdapter[_Accepted | _Refused] = TypeAdapter(_Accepted | _Refused)


def ledger_rows(reply: Any) -> list[LedgerRow]:
    """Parse userNonFundingLedgerUpdates."""
    return _parse(_ROWS, reply)


def tx_details(reply: Any) -> TxDetails | None:
    """Parse txDetails; None when the explorer does not know the hash (yet)."""
    tx = _parse(_TX, reply).tx
    return None if tx is None else TxDetails(tx.hash, tx.time, tx.user, tx.action, tx.error)


def token_index(reply: Any, token: str) -> int:
    """Parse spotMeta: return the index of a token by its full id. Raises ChainError if it is not there."""
    for known in _parse(_SPOT_META, reply).tokens:
        if f"{known.name}:{known.token_id}" == token:
            return known.index
    raise ChainError(f"the chain has no token {token}")


def balance_of(reply: Any, index: int) -> str:
    """Parse spotClearinghouseState: return the decimal amount held of a token."""
    balances = _parse(_BALANCES, reply).balances
    return next((balance.total for balance in balances if balance.token == index), "0")


def destination(reply: Any) -> Destination:
    """Parse preTransferCheck."""
    check = _parse(_CHECK, reply)
    return Destination(exists=check.user_exists, sanctioned=check.is_sanctioned)


def actions_left(reply: Any) -> int:
    """Parse userRateLimit: return how many actions the account may still send."""
    limit = _parse(_LIMIT, reply)
    return max(0, limit.n_requests_cap - limit.n_requests_used)


def refusal(reply: Any) -> Refusal | None:
    """Parse the answer to POST /exchange; None when the action was carried out."""
    answer = _parse(_ANSWER, reply)
    return Refusal(answer.response) if isinstance(answer, _Refused) else None


def _parse(adapter: TypeAdapter[_T], reply: Any) -> _T:
    try:
        return adapter.validate_python(reply)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ChainError(f"the chain's answer is not what it should be: {place}: {first['msg']}") from error
