"""How a job ended, as the books keep it with the entry that ends the job, and the outcome that this gives."""

import zlib
from base64 import b85decode, b85encode
from collections.abc import Mapping

from pydantic import TypeAdapter

from azu.money.ledger.transfers import MAX_OUTCOME_BYTES, Expire, Release, Reserve, Settle
from azu.protocol.job import FinishReason, JobEnding, JobOutcome, JobState, Receipt
from azu.units import KIB

_ENDING = TypeAdapter(JobEnding)
_PACKED = "~"
# All calls wait while an ending is packed, and one that is longer would hardly fit.
_MOST_PACKED = 256 * KIB
# What is kept of an error that is too long: each of these, cut. They fit, whatever the characters are.
_OF_ERRORS = ("message", "type", "param", "code")
_MOST_CHARACTERS = 200
# The end of a job that was reserved and never written.
LOST = JobEnding(
    JobState.FAILED,
    FinishReason.ERROR,
    {"message": "the job was lost before it ran", "type": "server_error", "param": None, "code": "job_lost"},
)


def outcome_of(hold: Reserve, end: Settle | Release | Expire) -> JobOutcome:
    """Return how a job has ended from the two entries of its money alone."""
    ending = LOST if isinstance(end, Expire) or not end.outcome else _unpack(end.outcome)
    charge = end if isinstance(end, Settle) else Settle(
        id=end.id, job_id=end.job_id, charged_lamports=0, platform_lamports=0, shares={}
    )  # fmt: skip
    receipt = Receipt(
        job_id=hold.job_id,
        address=hold.address,
        model_id=hold.model_id,
        revision=hold.revision,
        prompt_tokens=charge.prompt_tokens,
        completion_tokens=charge.completion_tokens,
        num_layers=hold.num_layers,
        lamports_per_token_layer=hold.lamports_per_token_layer,
        charged_lamports=charge.charged_lamports,
        released_lamports=hold.lamports - charge.charged_lamports,
        platform_lamports=charge.platform_lamports,
        worker_lamports=charge.shares,
        transfer_id=end.id,
        topology=ending.topology,
        held_lamports=sum(charge.held.values()),
    )
    return JobOutcome(ending.state, ending.finish_reason, receipt, ending.error)


def pack_ending(ending: JobEnding) -> str:
    """Return an ending as the ledger keeps it; which experts ran where is left out where that is too long."""
    text = _ENDING.dump_json(ending, exclude_defaults=True).decode()
    if 1024 < len(text) <= _MOST_PACKED:
        text = _PACKED + b85encode(zlib.compress(text.encode(), 9)).decode()
    if len(text.encode()) <= MAX_OUTCOME_BYTES:
        return text
    return pack_ending(JobEnding(ending.state, ending.finish_reason, _short(ending.error)))


def _unpack(text: str) -> JobEnding:
    if text.startswith(_PACKED):
        text = zlib.decompress(b85decode(text.removeprefix(_PACKED))).decode()
    return _ENDING.validate_json(text)


def _short(error: Mapping[str, str | None] | None) -> Mapping[str, str | None] | None:
    if error is None:
        return None
    kept = {name: error[name] for name in _OF_ERRORS if name in error}
    return {name: value and value[:_MOST_CHARACTERS] for name, value in kept.items()}
