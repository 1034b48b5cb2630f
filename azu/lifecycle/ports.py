"""What the life of a job needs from the outside, as narrow as it is used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from azu.errors import AzuError
from azu.ledger.transfers import Transfer
from azu.protocol.job import FinishReason, Job, JobOutcome, Placement


@dataclass(frozen=True, slots=True)
class Ran:
    """What a job's sequence did until it ended, as its pipeline counted it.

    `work` maps layer -> node id -> parameter bytes activated for tokens that are charged.
    """

    completion_tokens: int
    finish_reason: FinishReason
    work: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    error: AzuError | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """Where a deployed model runs: who is paid for each node, and the receipt's lines."""

    payout_by_node: Mapping[str, str]
    placements: tuple[Placement, ...]


class TransferLog(Protocol):
    """The ledger: a transfer with a known id is answered with its first result."""

    async def apply(self, transfer: Transfer) -> object:
        """Apply a transfer once."""


class JobStore(Protocol):
    """Durable jobs."""

    async def submit(self, job: Job) -> None:
        """Write the job and queue it."""

    async def plan_end(self, job_id: str, outcome: JobOutcome) -> JobOutcome:
        """Write down how a job is going to end; return what was written first."""

    async def finish(self, job_id: str, outcome: JobOutcome) -> bool:
        """Write the outcome unless there is one; say if this one was written."""
