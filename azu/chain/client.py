"""The chain's HTTP API, read and written with timeouts and backoff."""

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from azu.chain import replies
from azu.chain.replies import Destination, LedgerRow, LedgerTransfer, Refusal, TxDetails
from azu.chain.tokens import Network
from azu.errors import ChainError
from azu.units import lamports_from_hype

_LOG = logging.getLogger(__name__)
_TIMEOUT = httpx.Timeout(10.0, connect=5.0)
_RETRY_S = 20.0
_PAGE_ROWS = 500


class _Passing(Exception):
    """A failure that may be gone at the next try."""


class ChainClient:
    """One network's API. Reads are tried again while that can help; an action is posted once.

    Every method raises ChainError when there is no answer that azu can act on.
    """

    def __init__(self, network: Network, http: httpx.AsyncClient | None = None) -> None:
        self.network = network
        self._http = http or httpx.AsyncClient(timeout=_TIMEOUT)
        self._hype_index: int | None = None

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ledger_updates(self, user: str, start_ms: int) -> AsyncIterator[tuple[LedgerTransfer, ...]]:
        """Yield the transfers of an account's ledger since `start_ms`, oldest first, page by page.

        Rows that the chain repeats within the answer come once.
        """
        seen: set[str] = set()
        while True:
            rows = await self._rows(user, start_ms)
            fresh = {key: row for row in rows if (key := _key(row)) not in seen}
            if not fresh and len(rows) < _PAGE_ROWS:
                return
            if fresh:
                transfers = (row.transfer for row in fresh.values())
                yield tuple(transfer for transfer in transfers if transfer is not None)
                seen.update(fresh)
                start_ms = max(row.time for row in rows)
            else:
                # The API cannot page within a millisecond; what is beyond it needs the operator's eyes.
                _LOG.error("%s has more ledger rows at %d ms than a page holds", user, start_ms)
                start_ms += 1

    async def tx_details(self, tx_hash: str) -> TxDetails | None:
        """Return what the explorer knows of a hash; None if it does not know it (yet)."""
        query = {"type": "txDetails", "hash": tx_hash}
        return replies.tx_details(await self._read(self.network.explorer_url, query))

    async def spot_balance(self, user: str) -> int:
        """Return the lamports of HYPE, by exact token, in an account's spot balance."""
        if self._hype_index is None:
            meta = await self._info({"type": "spotMeta"})
            self._hype_index = replies.token_index(meta, self.network.hype)
        state = await self._info({"type": "spotClearinghouseState", "user": user})
        return lamports_from_hype(replies.balance_of(state, self._hype_index))

    async def destination(self, user: str, source: str) -> Destination:
        """Return what a transfer from `source` to `user` would meet."""
        return replies.destination(
            await self._info({"type": "preTransferCheck", "user": user, "source": source})
        )

    async def actions_left(self, user: str) -> int:
        """Return how many actions the chain still takes from an address before it slows it down."""
        return replies.actions_left(await self._info({"type": "userRateLimit", "user": user}))

    async def post_action(self, body: bytes) -> Refusal | None:
        """Post a signed action once; None when the chain says that it carried it out.

        Raises ChainError when it is unknown whether it did: look at the ledger, then send the same bytes.
        """
        response = await self._post(f"{self.network.api_url}/exchange", body)
        if response.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
            return Refusal(f"malformed: {response.text[:200]}")
        if response.status_code != httpx.codes.OK:
            raise ChainError(f"the chain answered {response.status_code} to an action")
        return replies.refusal(_json(response))

    async def _rows(self, user: str, start_ms: int) -> list[LedgerRow]:
        query = {"type": "userNonFundingLedgerUpdates", "user": user, "startTime": start_ms}
        return replies.ledger_rows(await self._info(query))

    async def _info(self, query: dict[str, Any]) -> Any:
        return await self._read(f"{self.network.api_url}/info", query)

    async def _read(self, url: str, query: dict[str, Any]) -> Any:
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(_Passing),
            stop=stop_after_delay(_RETRY_S),
            wait=wait_random_exponential(multiplier=0.2, max=5),
            reraise=True,
        )
        try:
            return await attempts(self._read_once, url, query)
        except _Passing as error:
            raise ChainError(f"{query['type']}: {error}") from error

    async def _read_once(self, url: str, query: dict[str, Any]) -> Any:
        try:
            response = await self._post(url, json.dumps(query).encode())
        except ChainError as error:
            raise _Passing(error.message) from error
        if response.status_code == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error:
            raise _Passing(f"the chain answered {response.status_code}")
        if response.status_code != httpx.codes.OK:
            raise ChainError(f"{query['type']}: the chain answered {response.status_code}")
        return _json(response)

    async def _post(self, url: str, body: bytes) -> httpx.Response:
        try:
            return await self._http.post(url, content=body, headers={"content-type": "application/json"})
        except httpx.HTTPError as error:
            raise ChainError(f"the chain did not answer: {type(error).__name__}") from error


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise ChainError("the chain's answer is not JSON") from error


def _key(row: LedgerRow) -> str:
    return f"{row.time} {row.hash} {json.dumps(row.delta, sort_keys=True)}"
