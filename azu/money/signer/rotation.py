"""Replacing the platform's key while no network runs: each step may be repeated after an end anywhere."""

import asyncio
import logging
from pathlib import Path

from eth_account.signers.local import LocalAccount

from azu.auth.succession import keep_succession, platforms_of, read_successions, sign_succession, successor_of
from azu.errors import ChainError, ConfigurationError, Conflict
from azu.money.chain.actions import sign_noop, sign_send_asset
from azu.money.chain.port import Chain
from azu.money.chain.rows import KEPT_LAMPORTS
from azu.money.signer.account import PlatformAccount
from azu.money.signer.policy import SignerState, retired, waiting
from azu.money.signer.signer import keep_state, read_state

_LOG = logging.getLogger(__name__)
# No payout has such a nonce.
_NO_KIND, _KINDS = 3, 4
_LOOKS, _LOOK_EVERY_S = 60, 0.5


async def rotate(chain: Chain, old: LocalAccount, new: LocalAccount, memory: Path, record: Path) -> int:
    """Have a new key replace the platform's, and move what the old address holds; return its lamports.

    `memory` is the signer's file, `record` that of successions. No transfer that the old key signed is
    executed later. Raises ChainError where an answer of the chain is missing, and Conflict where the new
    address cannot be paid; then the next call goes on. Raises Conflict for an address that another replaced,
    ConfigurationError without the file.
    """
    source, target = old.address.lower(), new.address.lower()
    known = read_successions(record)
    if (successor := successor_of(source, known)) not in (None, target):
        raise Conflict(f"{source} was replaced by {successor} before: take that key")
    if target in platforms_of(source, known):
        raise Conflict(f"{target} was the platform's address before; take another key")
    recipient = await chain.recipient(target, source)
    if recipient.sanctioned or not (recipient.exists or recipient.has_fee):
        raise Conflict(f"the chain takes no transfer to {target}: it is barred, or its fee is not paid for")
    if not memory.exists():
        # It says what the old key signed and the chain may still execute.
        raise ConfigurationError(f"there is no {memory}: no network with this key ever ran here")
    await _use_up(chain, old, memory)
    keep_succession(record, sign_succession(old, new))
    return await move(chain, old, target)


async def move(chain: Chain, old: LocalAccount, target: str) -> int:
    """Send what an address holds to another of the same platform; return the lamports, once they are there.

    A call that is repeated finds nothing left. Raises ChainError.
    """
    source = old.address.lower()
    lamports = await chain.spot_balance(source) - KEPT_LAMPORTS
    if lamports <= 0:
        return 0
    now_ms = await chain.now_ms()
    nonce = now_ms + (_NO_KIND - now_ms) % _KINDS
    action = sign_send_asset(old, chain.network, destination=target, lamports=lamports, nonce=nonce)
    refusal = await chain.post_action(action.body)
    if refusal is not None:
        raise ChainError(f"the chain did not move {lamports} lamports: {refusal.reason}")
    for _ in range(_LOOKS):
        # Others may send to it meanwhile.
        if await chain.spot_balance(source) < KEPT_LAMPORTS + lamports:
            return lamports
        await asyncio.sleep(_LOOK_EVERY_S)
    raise ChainError(f"the chain does not show that {lamports} lamports moved; try again")


async def _use_up(chain: Chain, old: LocalAccount, memory: Path) -> None:
    """Use up the nonces of all that the old key signed and the chain does not show."""
    state: SignerState = read_state(memory)
    view = await PlatformAccount(chain, (old.address.lower(),)).view(state.matched_until_ms)
    for nonce in waiting(state, view):
        refusal = await chain.post_action(sign_noop(old, chain.network, nonce=nonce).body)
        if refusal is not None and not refusal.nonce_used:
            raise ChainError(f"the chain did not use up nonce {nonce}: {refusal.reason}")
        _LOG.warning("used up nonce %d", nonce)
    keep_state(memory, retired(state, view.now_ms))
