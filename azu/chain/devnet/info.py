"""The read side of the devnet: POST /info and POST /explorer."""

from collections.abc import Callable, Mapping
from typing import Any

from azu.chain.devnet.state import ACTIVATION_FEE, USDC, Chain, Row, decimal

_PAGE_ROWS = 500
_REQUESTS_CAP = 10_000
_NO_MARGIN = {"accountValue": "0.0", "totalMarginUsed": "0.0", "totalNtlPos": "0.0", "totalRawUsd": "0.0"}

Query = Mapping[str, Any]


class UnknownQuery(Exception):
    """The chain does not know this request, or a field of it is missing or wrong."""


def answer_info(chain: Chain, query: Query, now_ms: int, *, twice: bool = False) -> Any:
    """Answer POST /info. `twice` lists every ledger row two times. Raises UnknownQuery."""
    match query.get("type"):
        case "meta":
            return {"universe": []}
        case "spotMeta":
            return _spot_meta(chain)
        case "allMids":
            return {}
        case "userNonFundingLedgerUpdates":
            return _ledger_updates(chain, query, now_ms, twice=twice)
        case str(kind) if kind in _ABOUT_AN_ACCOUNT:
            return _ABOUT_AN_ACCOUNT[kind](chain, _user(query))
        case unknown:
            raise UnknownQuery(str(unknown))


def answer_explorer(chain: Chain, query: Query) -> Any:
    """Answer POST /explorer. Raises UnknownQuery."""
    match query.get("type"):
        case "txDetails":
            tx = chain.txs.get(str(query.get("hash")))
            return (
                {"type": "error", "message": "tx not found"}
                if tx is None
                else {"type": "txDetails", "tx": tx}
            )
        case "userDetails":
            user = _user(query)
            mine = [tx for tx in chain.txs.values() if tx["user"] == user]
            return {"type": "userDetails", "txs": mine[::-1]}
        case unknown:
            raise UnknownQuery(str(unknown))


def _user(query: Query) -> str:
    user = query.get("user")
    if not isinstance(user, str) or len(user) != 42:
        raise UnknownQuery("user")
    return user.lower()


def _ledger_updates(chain: Chain, query: Query, now_ms: int, *, twice: bool) -> list[dict[str, Any]]:
    start, end = query.get("startTime", 0), query.get("endTime")
    if not isinstance(start, int) or not isinstance(end, int | None):
        raise UnknownQuery("startTime")
    rows = [
        row
        for row in chain.rows.get(_user(query), ())
        if row.visible_at_ms <= now_ms and start <= row.time_ms and (end is None or row.time_ms <= end)
    ]
    rows.sort(key=lambda row: row.time_ms)
    if twice:
        rows = [row for row in rows for _ in range(2)]
    return [_row(row) for row in rows[:_PAGE_ROWS]]


def _row(row: Row) -> dict[str, Any]:
    return {"time": row.time_ms, "hash": row.hash, "delta": dict(row.delta)}


def _spot_meta(chain: Chain) -> Any:
    tokens = [
        {
            "name": token.name,
            "szDecimals": 2,
            "weiDecimals": 8,
            "index": token.index,
            "tokenId": token.full_id.split(":")[1],
            "isCanonical": token.index in (0, 150),
            "evmContract": None,
            "fullName": None,
        }
        for token in chain.tokens.values()
    ]
    pair = {"tokens": [150, 0], "name": "@107", "index": 107, "isCanonical": False}
    return {"universe": [pair], "tokens": tokens}


def _spot_state(chain: Chain, user: str) -> Any:
    balances = [
        {
            "coin": token.name,
            "token": token.index,
            "total": decimal(chain.balance(user, token)),
            "hold": "0.0",
            "entryNtl": "0.0",
        }
        for token in chain.tokens.values()
        if chain.balance(user, token)
    ]
    return {"balances": balances}


def _perp_state(_chain: Chain, _address: str) -> Any:
    return {
        "marginSummary": _NO_MARGIN,
        "crossMarginSummary": _NO_MARGIN,
        "crossMaintenanceMarginUsed": "0.0",
        "withdrawable": "0.0",
        "assetPositions": [],
    }


def _transfer_check(chain: Chain, user: str) -> Any:
    exists = chain.exists(user)
    return {
        "fee": decimal(0 if exists else ACTIVATION_FEE),
        "feeToken": USDC.name,
        "isSanctioned": False,
        "userExists": exists,
        "userHasSentTx": chain.requests_used.get(user, 0) > 0,
    }


def _rate_limit(chain: Chain, user: str) -> Any:
    used = chain.requests_used.get(user, 0)
    return {"cumVlm": "0.0", "nRequestsUsed": used, "nRequestsCap": _REQUESTS_CAP, "nRequestsSurplus": 0}


_ABOUT_AN_ACCOUNT: Mapping[str, Callable[[Chain, str], Any]] = {
    "spotClearinghouseState": _spot_state,
    "clearinghouseState": _perp_state,
    "preTransferCheck": _transfer_check,
    "userRateLimit": _rate_limit,
    "userRole": lambda chain, user: {"role": "user" if chain.exists(user) else "missing"},
    "userAbstraction": lambda chain, user: "unifiedAccount" if user in chain.unified else "disabled",
}
