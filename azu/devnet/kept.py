"""A devnet's chain that a file keeps, so that a restarted network's books find what they know.

Each line is one change; the first line is a salt, from which the hashes of transactions follow.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from azu.devnet.chain import HYPE, SECOND_HYPE, USDC, DevnetState, ExchangeRequest, Token
from azu.errors import ConfigurationError

_TOKENS = {token.full_id: token for token in (HYPE, USDC, SECOND_HYPE)}


class KeptChain(DevnetState):
    """The chain as its file has it; every change is on disk before it is answered.

    Raises ConfigurationError for a damaged file; a last line that was not written whole is dropped.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        lines = _lines(path)
        self._salt, *changes = lines or [secrets.token_hex(16)]
        try:
            for change in changes:
                self._replay(change)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"{path} is damaged; without it a new chain begins") from error
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        if not lines:
            self._write(self._salt)

    def new_hash(self) -> str:
        """Return the hash of the next transaction."""
        return f"0x{hashlib.sha256(f'{self._salt} {len(self.txs)}'.encode()).hexdigest()}"

    def fund(self, address: str, token: Token, amount: int, now_ms: int) -> str:
        """Create an amount of a token; returns the hash of the transaction."""
        tx_hash = super().fund(address, token, amount, now_ms)
        self._write(["fund", address, token.full_id, amount, now_ms])
        return tx_hash

    def send_from_contract(
        self, sender: str, destination: str, token: Token, amount: int, count: int, now_ms: int
    ) -> None:
        """Make new money and have a contract of HyperEVM send it."""
        super().send_from_contract(sender, destination, token, amount, count, now_ms)
        self._write(["contract", sender, destination, token.full_id, amount, count, now_ms])

    def execute(
        self,
        request: ExchangeRequest,
        signer: str,
        raw: Mapping[str, Any],
        now_ms: int,
        *,
        rows_late_ms: int = 0,
    ) -> Mapping[str, Any]:
        """Carry out a signed action or refuse it; returns the chain's answer in both cases."""
        before = len(self.txs)
        answer = super().execute(request, signer, raw, now_ms, rows_late_ms=rows_late_ms)
        if len(self.txs) > before:
            sent = request.model_dump(by_alias=True, mode="json")
            self._write(["execute", sent, signer, dict(raw), now_ms, rows_late_ms])
        return answer

    def _replay(self, change: Any) -> None:
        match change:
            case ["fund", address, token, amount, now_ms]:
                super().fund(address, _TOKENS[token], amount, now_ms)
            case ["contract", sender, destination, token, amount, count, now_ms]:
                super().send_from_contract(sender, destination, _TOKENS[token], amount, count, now_ms)
            case ["execute", sent, signer, raw, now_ms, rows_late_ms]:
                request = ExchangeRequest.model_validate(sent)
                super().execute(request, signer, raw, now_ms, rows_late_ms=rows_late_ms)
            case _:
                raise ValueError(f"an unknown change {change!r}")

    def _write(self, change: Any) -> None:
        self._file.write(f"{json.dumps(change)}\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _lines(path: Path) -> list[Any]:
    """Return the changes in a file, and cut off a last line that was not written whole."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise ConfigurationError(f"{path} is damaged; without it a new chain begins") from error
