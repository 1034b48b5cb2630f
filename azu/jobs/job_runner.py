"""Pipeline: the loop of one deployed model. Token ids pass through here, hidden states never do."""

import asyncio
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from azu.engine.accounting import Work
from azu.errors import AzuError
from azu.protocol.job import FinishReason, Job, JobRun

# A job that several sequences answer has ended as the one that says most did.
_WORST_LAST = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.ERROR)
_SEED_RANGE = 2**63
# Whoever asked for a job may die before it hears how the job ended; its heir asks again.
_KEPT_JOBS = 1000


@dataclass(slots=True)
class _ActiveJob:
    """A job whose choices have not all ended."""

    job: Job
    ended: asyncio.Future[JobRun]
    open: set[int] = field(default_factory=set)
    delivered: int = 0
    cancelled: bool = False
    reason: FinishReason = FinishReason.STOP
    work: defaultdict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def choice_ended(self, reason: FinishReason, work: Work) -> None:
        """Count a choice that says no more."""
        self.reason = max(self.reason, reason, key=_WORST_LAST.index)
        for layer, by_node in work.items():
            self.work[layer].update(by_node)

    def end(self, broken: AzuError | None) -> None:
        """Say what became of the job, when no choice is open."""
        error = broken if self.reason is FinishReason.CANCELLED and not self.cancelled else None
        run = JobRun(
            completion_tokens=self.delivered,
            finish_reason=FinishReason.ERROR if error else self.reason,
            work={layer: dict(by_node) for layer, by_node in self.work.items()},
            error=error,
        )
        self.ended.set_result(run)
