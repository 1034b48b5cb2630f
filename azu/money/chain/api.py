"""Hyperliquid's HTTP API, read and written with timeouts and backoff: the Chain port's implementation."""

import json
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar

import httpx
from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from azu.errors import ChainError, InvalidRequest, plain_fault
from azu.money.chain.networks import ChainNetwork
from azu.money.chain.port import LedgerTransfer, Recipient, Refusal, TxDetails
from azu.units import lamports_from_hype

_LOG = logging.getLogger(__name__)
_TIMEOUT = httpx.Timeout(10.0, connect=5.0)
_RETRY_S = 20.0
_PAGE_ROWS = 500
_TRANSFERS = ("send", "spotTransfer")
_SPOT = "spot"
_T = TypeVar("_T")


class ChainClient:
    """One network's API. A read is repeated after a temporary failure; an action is posted once.

    Every method raises ChainError when there is no answer that azu can act on.
    """

    def __init__(self, network: ChainNetwork, http: httpx.AsyncClient | None = None) -> None:
        self.network = network
        self._http = http or httpx.AsyncClient(timeout=_TIMEOUT)
        self._hype_index: int | None = None

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ledger_updates(self, user: str, start_ms: int) -> AsyncIterator[tuple[LedgerTransfer, ...]]:
        """Yield the transfers of an account's ledger since `start_ms`, oldest first, page by page.

        Of more rows in one millisecond than a page holds only the first are shown: the API has no pages
        within a millisecond. The senders' ledgers have the others.
        """
        seen = Counter[str]()
        while True:
            rows = await self._rows(user, start_ms)
            # A page begins with all rows of its first millisecond, so that of each it has no fewer copies.
            copies = Counter[str]()
            fresh = []
            for row in rows:
                key = _row_key(row)
                copies[key] += 1
                if copies[key] > seen[key]:
                    fresh.append((row, copies[key] - 1))
            if not fresh and len(rows) < _PAGE_ROWS:
                return
            if fresh:
                transfers = (row.transfer(nth) for row, nth in fresh)
                yield tuple(transfer for transfer in transfers if transfer is not None)
                seen |= copies
                start_ms = max(row.time for row in rows)
            else:
                _LOG.error("%s has more ledger rows at %d ms than a page holds", user, start_ms)
                start_ms += 1

    async def tx_details(self, tx_hash: str) -> TxDetails | None:
        """Return what the explorer knows of a hash, None if it does not know the hash (yet)."""
        query = {"type": "txDetails", "hash": tx_hash}
        return parse_tx_details(await self._read(self.network.explorer_url, query))

    async def spot_balance(self, user: str) -> int:
        """Return the lamports of HYPE, by exact token, in an account's spot balance."""
        index = await self._index()
        return sum(_lamports(one.total) for one in await self._balances(user) if one.token == index)

    async def namesakes(self, user: str) -> int:
        """Return the lamports that an account holds of other tokens that are called HYPE, rounded up."""
        index, name = await self._index(), self.network.hype.partition(":")[0]
        held = await self._balances(user)
        return sum(rounded_up(one.total) for one in held if one.coin == name and one.token != index)

    async def now_ms(self) -> int:
        """Return the chain's time."""
        return _parse(_STATUS, await self._info({"type": "exchangeStatus"})).time

    async def recipient(self, user: str, source: str) -> Recipient:
        """Return what the chain says of `user` as the recipient of a transfer from `source`."""
        check = _parse(_CHECK, await self._info({"type": "preTransferCheck", "user": user, "source": source}))
        has_fee = check.user_exists
        if not has_fee:
            held = await self._balances(source)
            paid_in = sum(rounded_up(one.total) for one in held if one.coin == check.fee_token)
            has_fee = paid_in >= _lamports(check.fee)
        return Recipient(exists=check.user_exists, sanctioned=check.is_sanctioned, has_fee=has_fee)

    async def actions_left(self, user: str) -> int:
        """Return how many actions the chain still accepts from an address before it limits the rate."""
        return parse_actions_left(await self._info({"type": "userRateLimit", "user": user}))

    async def post_action(self, body: bytes) -> Refusal | None:
        """Post a signed action once; return None when the chain says that it executed the action.

        Raises ChainError when it is unknown whether the chain did: the caller reads the ledger, then posts
        the same bytes again.
        """
        response = await self._post(f"{self.network.api_url}/exchange", body)
        if response.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
            return Refusal(f"malformed: {response.text[:200]}")
        if response.status_code != httpx.codes.OK:
            raise ChainError(f"the chain answered {response.status_code} to an action")
        return parse_refusal(_json(response))

    async def _index(self) -> int:
        """Return the number of the token HYPE."""
        if self._hype_index is None:
            meta = await self._info({"type": "spotMeta"})
            self._hype_index = _token_index(meta, self.network.hype)
        return self._hype_index

    async def _balances(self, user: str) -> "list[_Balance]":
        state = await self._info({"type": "spotClearinghouseState", "user": user})
        return _parse(_BALANCES, state).balances

    async def _rows(self, user: str, start_ms: int) -> "list[LedgerRow]":
        query = {"type": "userNonFundingLedgerUpdates", "user": user, "startTime": start_ms}
        return parse_ledger_rows(await self._info(query))

    async def _info(self, query: dict[str, Any]) -> Any:
        return await self._read(f"{self.network.api_url}/info", query)

    async def _read(self, url: str, query: dict[str, Any]) -> Any:
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(_TemporaryFailure),
            stop=stop_after_delay(_RETRY_S),
            wait=wait_random_exponential(multiplier=0.2, max=5),
            reraise=True,
        )
        try:
            return await attempts(self._read_once, url, query)
        except _TemporaryFailure as error:
            raise ChainError(f"{query['type']}: {error}") from error

    async def _read_once(self, url: str, query: dict[str, Any]) -> Any:
        try:
            response = await self._post(url, json.dumps(query).encode())
        except ChainError as error:
            raise _TemporaryFailure(error.message) from error
        if response.status_code == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error:
            raise _TemporaryFailure(f"the chain answered {response.status_code}")
        if response.status_code != httpx.codes.OK:
            raise ChainError(f"{query['type']}: the chain answered {response.status_code}")
        return _json(response)

    async def _post(self, url: str, body: bytes) -> httpx.Response:
        try:
            return await self._http.post(url, content=body, headers={"content-type": "application/json"})
        except httpx.HTTPError as error:
            raise ChainError(f"the chain did not answer: {type(error).__name__}") from error


class _TemporaryFailure(Exception):
    """A failure that another try may not meet."""


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise ChainError("the chain's answer is not JSON") from error


def _row_key(row: "LedgerRow") -> str:
    return f"{row.time} {row.hash} {json.dumps(row.delta, sort_keys=True)}"


def parse_ledger_rows(reply: Any) -> "list[LedgerRow]":
    """Parse userNonFundingLedgerUpdates."""
    return _parse(_ROWS, reply)


def parse_tx_details(reply: Any) -> TxDetails | None:
    """Parse txDetails; return None when the explorer does not know the hash (yet)."""
    tx = _parse(_TX, reply).tx
    return None if tx is None else TxDetails(tx.hash, tx.time, tx.user, tx.action, tx.error)


def parse_actions_left(reply: Any) -> int:
    """Parse userRateLimit: return how many actions the account may still send."""
    limit = _parse(_LIMIT, reply)
    return max(0, limit.n_requests_cap - limit.n_requests_used)


def parse_refusal(reply: Any) -> Refusal | None:
    """Parse the answer to POST /exchange; return None when the action was executed."""
    answer = _parse(_ANSWER, reply)
    if not isinstance(answer, _RefusedReply):
        return None
    reason = answer.response
    return Refusal(
        reason,
        nonce_used="duplicate nonce" in reason or "nonce too low" in reason,
        no_account=reason.startswith("Must deposit"),
    )


def _token_index(reply: Any, token: str) -> int:
    """Parse spotMeta: return the index of a token by its full id; raises ChainError for an unknown one."""
    for known in _parse(_SPOT_META, reply).tokens:
        if f"{known.name}:{known.token_id}" == token:
            return known.index
    raise ChainError(f"the chain has no token {token}")


def _lamports(amount: str) -> int:
    try:
        return lamports_from_hype(amount)
    except InvalidRequest as error:
        raise ChainError(f"the chain's answer is not what it should be: {error.message}") from error


def rounded_up(amount: str) -> int:
    """Return lamports of any token: it may have more decimals than HYPE, and a larger supply."""
    try:
        return math.ceil(Decimal(amount).scaleb(8))
    except (ArithmeticError, ValueError) as error:
        raise ChainError("the chain's answer is not what it should be: a balance is no number") from error


def _parse(adapter: TypeAdapter[_T], reply: Any) -> _T:
    try:
        return adapter.validate_python(reply)
    except ValidationError as error:
        place, fault = plain_fault(error.errors(include_input=False))
        raise ChainError(f"the chain's answer is not what it should be: {place}: {fault}") from error


Lower = Annotated[str, BeforeValidator(lambda text: text.lower() if isinstance(text, str) else text)]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="ignore", alias_generator=to_camel)


class LedgerRow(_Reply):
    """One row of userNonFundingLedgerUpdates, of any kind."""

    time: int
    hash: Lower
    delta: dict[str, Any]

    def transfer(self, nth: int = 0) -> LedgerTransfer | None:
        """Return the row as a transfer, None if it is of another kind; raises ChainError if malformed."""
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
            nth=nth,
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
    coin: str
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
    fee: str = "0"
    fee_token: str = ""


class _Status(_Reply):
    time: int


class _RateLimit(_Reply):
    n_requests_used: int
    n_requests_cap: int


class _Accepted(_Reply):
    status: Literal["ok"]
    response: dict[str, Any]


class _RefusedReply(_Reply):
    status: Literal["err"]
    response: str


_ROWS = TypeAdapter(list[LedgerRow])
_DELTA = TypeAdapter(_Delta)
_TX = TypeAdapter(_TxReply)
_BALANCES = TypeAdapter(_Balances)
_SPOT_META = TypeAdapter(_SpotMeta)
_CHECK = TypeAdapter(_TransferCheck)
_STATUS = TypeAdapter(_Status)
_LIMIT = TypeAdapter(_RateLimit)
_ANSWER: TypeAdapter[_Accepted | _RefusedReply] = TypeAdapter(_Accepted | _RefusedReply)
