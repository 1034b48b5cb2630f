"""The devnet's HTTP server: the endpoints of the real chain, a faucet, and a switch for faults."""

import json
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from azu.clock import wall_clock_ms
from azu.devnet.chain import (
    ACTIVATION_FEE,
    HYPE,
    SECOND_HYPE,
    USDC,
    Address,
    Amount,
    DevnetState,
    Row,
    decimal,
    parse_exchange,
)
from azu.devnet.faults import Fault, FaultKind, Faults, FaultyWire
from azu.devnet.kept import KeptChain
from azu.errors import InvalidRequest
from azu.units import LAMPORTS_PER_HYPE, lamports_from_hype

_PAGE_ROWS = 500
_REQUESTS_CAP = 10_000
_NO_MARGIN = {"accountValue": "0.0", "totalMarginUsed": "0.0", "totalNtlPos": "0.0", "totalRawUsd": "0.0"}
# Enough to activate a few accounts: a funded account can pay a new platform at once.
_FAUCET_USDC = 10 * LAMPORTS_PER_HYPE

Query = Mapping[str, Any]


def serve(host: str, port: int, *, seed: int | None, file: Path | None, ready: Callable[[str], None]) -> None:
    """Serve a chain until SIGINT or SIGTERM; calls `ready` with its URL once it accepts connections.

    It is a new one without a `file`, else the one that the file keeps. Port 0 takes a free port. Raises
    OSError if the port is taken, ConfigurationError for a damaged file.
    """
    config = uvicorn.Config(
        build_app(DevnetState() if file is None else KeptChain(file), seed=seed),
        log_level="critical",  # uvicorn would log faults as errors
        timeout_graceful_shutdown=1,
    )
    with socket.create_server((host, port), backlog=1024) as listener:
        ready(f"http://{host}:{listener.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listener])


class FundRequest(BaseModel):
    """POST /devnet/fund: `amount` is a decimal string of the token."""

    model_config = ConfigDict(extra="forbid")

    address: Address
    amount: Amount
    token: Annotated[str, Field(max_length=80)] = HYPE.full_id


class ContractRequest(BaseModel):
    """POST /devnet/contract: a contract of HyperEVM sends `amount` of the token `count` times at once."""

    model_config = ConfigDict(extra="forbid")

    sender: Address
    destination: Address
    amount: Amount
    token: Annotated[str, Field(max_length=80)] = HYPE.full_id
    count: Annotated[int, Field(ge=1, le=10_000)] = 1


def build_app(chain: DevnetState | None = None, *, seed: int | None = None) -> FastAPI:
    """Return the app of a chain, a new one by default; `seed` fixes which requests random faults hit."""
    chain, faults = chain or DevnetState(), Faults(seed)
    wire = FaultyWire(faults)
    app = FastAPI(title="azu devnet", openapi_url=None)
    app.add_middleware(wire.wrap)
    # azu's page, which another server serves, sends the chain what its user's wallet has signed.
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_methods=["POST"], allow_headers=["content-type"]
    )

    def now() -> int:
        return chain.last_ms if faults.take(FaultKind.SAME_TIME) else wall_clock_ms()

    @app.post("/exchange")
    async def exchange(request: Request) -> Response:
        try:
            parsed, signer, raw = parse_exchange(await request.body())
        except InvalidRequest as error:
            return PlainTextResponse(error.message, status_code=422)
        late = faults.take(FaultKind.ROWS_LATE)
        rows_late_ms = round(late.seconds * 1000) if late else 0
        return JSONResponse(chain.execute(parsed, signer, raw, now(), rows_late_ms=rows_late_ms))

    @app.post("/info")
    async def info(request: Request) -> Response:
        twice = faults.take(FaultKind.ROWS_TWICE) is not None
        return await _answer(request, lambda query: answer_info(chain, query, wall_clock_ms(), twice=twice))

    @app.post("/explorer")
    async def explorer(request: Request) -> Response:
        return await _answer(request, lambda query: answer_explorer(chain, query))

    @app.post("/devnet/fund")
    async def fund(body: FundRequest) -> Response:
        token, address = chain.tokens.get(body.token), body.address.lower()
        if token is None:
            return PlainTextResponse(f"no token {body.token} here", status_code=404)
        tx_hash = chain.fund(address, token, lamports_from_hype(body.amount), wall_clock_ms())
        if chain.balance(address, USDC) < _FAUCET_USDC:
            chain.fund(address, USDC, _FAUCET_USDC, wall_clock_ms())
        return JSONResponse({"hash": tx_hash, "balance": decimal(chain.balance(address, token))})

    @app.post("/devnet/contract")
    async def contract(body: ContractRequest) -> Response:
        token = chain.tokens.get(body.token)
        if token is None:
            return PlainTextResponse(f"no token {body.token} here", status_code=404)
        sender, destination = body.sender.lower(), body.destination.lower()
        amount, now_ms = lamports_from_hype(body.amount), now()
        chain.send_from_contract(sender, destination, token, amount, body.count, now_ms)
        return JSONResponse({"time": now_ms})

    @app.post("/devnet/faults")
    async def add_fault(fault: Fault) -> Response:
        match fault.kind:
            case FaultKind.SECOND_HYPE:
                chain.tokens[SECOND_HYPE.full_id] = SECOND_HYPE
            case FaultKind.RESTART:
                wire.cut(fault.seconds)
            case _:
                faults.add(fault)
        return JSONResponse({"tokens": list(chain.tokens)})

    @app.delete("/devnet/faults")
    async def clear_faults() -> Response:
        faults.clear()
        wire.cut(0)
        return JSONResponse({})

    return app


async def _answer(request: Request, answer: Callable[[dict[str, Any]], Any]) -> Response:
    try:
        query = json.loads(await request.body())
        if not isinstance(query, dict):
            raise UnknownQuery("body")
        return JSONResponse(answer(query))
    except (ValueError, UnknownQuery):
        return PlainTextResponse("Failed to deserialize the JSON body into the target type", status_code=422)


class UnknownQuery(Exception):
    """A request of an unknown type, or with a field that is missing or wrong."""


def answer_info(chain: DevnetState, query: Query, now_ms: int, *, twice: bool = False) -> Any:
    """Answer POST /info. `twice` lists every ledger row two times. Raises UnknownQuery."""
    match query.get("type"):
        case "meta":
            return {"universe": []}
        case "spotMeta":
            return _spot_meta(chain)
        case "allMids":
            return {}
        case "exchangeStatus":
            return {"time": now_ms, "specialStatuses": None}
        case "userNonFundingLedgerUpdates":
            return _ledger_updates(chain, query, now_ms, twice=twice)
        case str(kind) if kind in _ACCOUNT_QUERIES:
            return _ACCOUNT_QUERIES[kind](chain, _user(query))
        case unknown:
            raise UnknownQuery(str(unknown))


def answer_explorer(chain: DevnetState, query: Query) -> Any:
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


def _ledger_updates(chain: DevnetState, query: Query, now_ms: int, *, twice: bool) -> list[dict[str, Any]]:
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


def _spot_meta(chain: DevnetState) -> Any:
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


def _spot_state(chain: DevnetState, user: str) -> Any:
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


def _perp_state(_chain: DevnetState, _address: str) -> Any:
    return {
        "marginSummary": _NO_MARGIN,
        "crossMarginSummary": _NO_MARGIN,
        "crossMaintenanceMarginUsed": "0.0",
        "withdrawable": "0.0",
        "assetPositions": [],
    }


def _transfer_check(chain: DevnetState, user: str) -> Any:
    exists = chain.exists(user)
    return {
        "fee": decimal(0 if exists else ACTIVATION_FEE),
        "feeToken": USDC.name,
        "isSanctioned": False,
        "userExists": exists,
        "userHasSentTx": chain.requests_used.get(user, 0) > 0,
    }


def _rate_limit(chain: DevnetState, user: str) -> Any:
    used = chain.requests_used.get(user, 0)
    return {"cumVlm": "0.0", "nRequestsUsed": used, "nRequestsCap": _REQUESTS_CAP, "nRequestsSurplus": 0}


_ACCOUNT_QUERIES: Mapping[str, Callable[[DevnetState, str], Any]] = {
    "spotClearinghouseState": _spot_state,
    "clearinghouseState": _perp_state,
    "preTransferCheck": _transfer_check,
    "userRateLimit": _rate_limit,
    "userRole": lambda chain, user: {"role": "user" if chain.exists(user) else "missing"},
    "userAbstraction": lambda chain, user: "unifiedAccount" if user in chain.unified else "disabled",
}
