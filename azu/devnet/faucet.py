"""The client of a devnet's faucet, which gives play money."""

import httpx

from azu.errors import ChainError, ConfigurationError
from azu.units import hype_from_lamports

_TIMEOUT_S = 10.0


def fund(chain_url: str, address: str, lamports: int) -> str:
    """Give an address HYPE of play money, and return the transaction's hash.

    Raises ConfigurationError where the chain has no faucet, ChainError when it does not answer.
    """
    body = {"address": address, "amount": hype_from_lamports(lamports)}
    try:
        reply = httpx.post(f"{chain_url}/devnet/fund", json=body, timeout=_TIMEOUT_S)
        if reply.is_client_error:
            raise ConfigurationError(f"{chain_url} gives no play money: HTTP {reply.status_code}")
        tx_hash: str = reply.raise_for_status().json()["hash"]
    except httpx.HTTPError as error:
        raise ChainError(f"the faucet of {chain_url} did not answer: {error}") from error
    return tx_hash
