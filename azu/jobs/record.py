"""A job as Redis keeps it, and how its parts become text."""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter

from azu.protocol.job import Job, JobOutcome, JobState, TokenEvent

JOB = TypeAdapter(Job)
OUTCOME = TypeAdapter(JobOutcome)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job, how far it is and how it ended.

    `attempts` counts how often it began to run; `cancelled` says that its user gave it up, which may be
    before anybody has acted on it.
    """

    job: Job
    state: JobState
    outcome: JobOutcome | None
    attempts: int
    cancelled: bool = False

    @classmethod
    def from_fields(cls, fields: Mapping[str, str]) -> "JobRecord":
        """Read a record's hash."""
        outcome = fields.get("outcome")
        return cls(
            job=JOB.validate_json(fields["job"]),
            state=JobState(fields["state"]),
            outcome=None if outcome is None else OUTCOME.validate_json(outcome),
            attempts=int(fields["attempts"]),
            cancelled="cancelled" in fields,
        )


def words(numbers: tuple[int, ...] | tuple[float, ...]) -> str:
    """Write numbers so that a script can count and cut them; floats keep every bit, infinities included."""
    return " ".join(map(str, numbers))


def event_from_entry(entry_id: str, fields: Mapping[str, str]) -> TokenEvent | JobOutcome:
    """Read one entry of a token stream; its id says how many tokens there are up to its end."""
    if "outcome" in fields:
        return OUTCOME.validate_json(fields["outcome"])
    token_ids = tuple(map(int, fields["tokens"].split()))
    return TokenEvent(
        index=end_of(entry_id) - len(token_ids),
        token_ids=token_ids,
        logprobs=tuple(map(float, fields["logprobs"].split())),
    )


def end_of(entry_id: str) -> int:
    """Return the number of completion tokens that exist up to an entry's end."""
    return int(entry_id.partition("-")[0])


def without_first(event: TokenEvent, after: int) -> TokenEvent:
    """Return an event without the tokens before completion index `after`."""
    known = max(0, after - event.index)
    return TokenEvent(event.index + known, event.token_ids[known:], event.logprobs[known:])
