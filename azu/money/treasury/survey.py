"""What an operator watches beside the books: the platform's account, limits, the disk, copies and audits."""

import asyncio
import secrets
import shutil
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from azu import metrics
from azu.files import write_private
from azu.metrics import Labels, Meter
from azu.money.chain.port import Chain
from azu.money.chain.rows import balance_of
from azu.money.signer.calls import SignerCalls

_FILE = "done.json"
_DONE = TypeAdapter(dict[str, int])


def note_done(home: Path, what: str, at_ms: int) -> None:
    """Note when an operator's command, such as "backup", was last carried out on the money of a home."""
    write_private(home / _FILE, _DONE.dump_json(last_done(home) | {what: at_ms}).decode())


def last_done(home: Path) -> dict[str, int]:
    """Return when each command was last carried out, in ms; a damaged file says nothing: an alert fires."""
    try:
        return _DONE.validate_json((home / _FILE).read_bytes(), strict=True)
    except (FileNotFoundError, ValidationError):
        return {}


class Survey:
    """Measures now and then what stands in no journal."""

    def __init__(self, chain: Chain, signer: SignerCalls, platforms: tuple[str, ...], home: Path) -> None:
        self._chain = chain
        self._signer = signer
        self._platforms = platforms
        self._home = home

    async def show(self, meter: Meter) -> None:
        """Show it in the metrics; raises Unavailable when chain or signer do not answer."""
        disk = shutil.disk_usage(self._home)
        meter.set_gauge(metrics.DISK_FREE, {("money",): disk.free / disk.total})
        done: dict[Labels, float] = {(what,): at_ms / 1000 for what, at_ms in last_done(self._home).items()}
        meter.set_gauge(metrics.LAST_DONE, done)
        asked = {
            metrics.WALLET: self._wallet(),
            metrics.ACTIONS_LEFT: self._actions_left(),
            metrics.FEE_MISSING: self._fee_missing(),
            metrics.LIMIT_USED: self._limit_used(),
        }
        answers = await asyncio.gather(*asked.values(), return_exceptions=True)
        for metric, answer in zip(asked, answers, strict=True):
            # What cannot be asked is unknown: a number of before would pass for one of now.
            meter.set_gauge(metric, {} if isinstance(answer, BaseException) else answer)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer

    async def _wallet(self) -> dict[Labels, float]:
        return {(): await balance_of(self._chain, self._platforms)}

    async def _actions_left(self) -> dict[Labels, float]:
        return {(): await self._chain.actions_left(self._platforms[0])}

    async def _fee_missing(self) -> dict[Labels, float]:
        # An address that the chain has never seen costs the fee of a new account.
        recipient = await self._chain.recipient(f"0x{secrets.token_hex(20)}", self._platforms[0])
        return {(): float(not recipient.has_fee)}

    async def _limit_used(self) -> dict[Labels, float]:
        return {(kind,): part for kind, part in (await self._signer.status()).day_parts.items()}
