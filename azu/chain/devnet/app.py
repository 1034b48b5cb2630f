"""The devnet over HTTP: the chain's own endpoints, a faucet and a switchboard for faults."""

import json
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from azu.chain.devnet.actions import Address, Amount, parse_exchange
from azu.chain.devnet.faults import Fault, FaultKind, Faults
from azu.chain.devnet.info import UnknownQuery, answer_explorer, answer_info
from azu.chain.devnet.state import HYPE, SECOND_HYPE, USDC, Chain, decimal
from azu.chain.devnet.wire import FaultyWire
from azu.errors import InvalidRequest
from azu.units import LAMPORTS_PER_HYPE, lamports_from_hype

# Enough to activate a few accounts: whoever is funded can pay a new platform at once.
_FAUCET_USDC = 10 * LAMPORTS_PER_HYPE


class FundRequest(BaseModel):
    """POST /devnet/fund: `amount` is a decimal string of the token."""

    model_config = ConfigDict(extra="forbid")

    address: Address
    amount: Amount
    token: Annotated[str, Field(max_length=80)] = HYPE.full_id


def build_app(*, seed: int | None = None) -> FastAPI:
    """Return a new chain with nothing on it; `seed` fixes which requests random faults strike."""
    chain, faults = Chain(), Faults(seed)
    wire = FaultyWire(faults)
    app = FastAPI(title="azu devnet", openapi_url=None)
    app.add_middleware(wire.around)

    @app.post("/exchange")
    async def exchange(request: Request) -> Response:
        try:
            parsed, signer, raw = parse_exchange(await request.body())
        except InvalidRequest as error:
            return PlainTextResponse(error.message, status_code=422)
        late = faults.strike(FaultKind.ROWS_LATE)
        rows_late_ms = round(late.seconds * 1000) if late else 0
        return JSONResponse(chain.execute(parsed, signer, raw, _now_ms(), rows_late_ms=rows_late_ms))

    @app.post("/info")
    async def info(request: Request) -> Response:
        twice = faults.strike(FaultKind.ROWS_TWICE) is not None
        return await _answer(request, lambda query: answer_info(chain, query, _now_ms(), twice=twice))

    @app.post("/explorer")
    async def explorer(request: Request) -> Response:
        return await _answer(request, lambda query: answer_explorer(chain, query))

    @app.post("/devnet/fund")
    async def fund(body: FundRequest) -> Response:
        token, address = chain.tokens.get(body.token), body.address.lower()
        if token is None:
            return PlainTextResponse(f"no token {body.token} here", status_code=404)
        tx_hash = chain.fund(address, token, lamports_from_hype(body.amount), _now_ms())
        if chain.balance(address, USDC) < _FAUCET_USDC:
            chain.fund(address, USDC, _FAUCET_USDC, _now_ms())
        return JSONResponse({"hash": tx_hash, "balance": decimal(chain.balance(address, token))})

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


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
