"""A job as Redis keeps it: its keys, its record, and its token stream as text."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from azu.errors import AzuError
from azu.protocol.job import FinishReason, Job, JobOutcome, JobState, TokenEvent
from azu.protocol.phase import JobPhase, answering, reading
from azu.protocol.sampling import SamplingParams
from azu.supervision import as_known_error

QUEUE = "azu:jobs:queue"
GROUP = "schedulers"
CANCELLED = "azu:jobs:cancelled"
ENDED = "azu:jobs:ended"
REMOVED = "azu:jobs:removed"
LOOKED = "azu:jobs:looked"
CANCELLATIONS_KEPT = 10_000
# So many errors on the way to its end, none of them another service's silence, end a job.
MOST_FAULTS = 3

JOB = TypeAdapter(Job)
WORK = TypeAdapter(Mapping[int, Mapping[str, int]])
OUTCOME = TypeAdapter(JobOutcome)
PHASE = TypeAdapter(JobPhase)
_NO_ALTERNATIVES = "-"


def job_key(job_id: str) -> str:
    """Return the key of a job's record."""
    return f"azu:job:{job_id}"


def tokens_key(job_id: str) -> str:
    """Return the key of a job's token stream."""
    return f"azu:job:{job_id}:tokens"


def readers_key(job_id: str) -> str:
    """Return the key of the readers that came back to a job."""
    return f"azu:job:{job_id}:readers"


def lost_key(job_id: str) -> str:
    """Return the key of the mark that a job is lost."""
    return f"azu:job:{job_id}:lost"


def asked_key(asked: str) -> str:
    """Return the key of the jobs of one request."""
    return f"azu:jobs:asked:{asked}"


def address_key(address: str) -> str:
    """Return the key of an address's jobs."""
    return f"azu:jobs:of:{address}"


def wake_key(name: str) -> str:
    """Return the key of the stream that wakes a blocked reader."""
    return f"azu:jobs:wake:{name}"


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job, its state and its outcome.

    `attempts` counts how often the job began to run, `delivered` its completion tokens so far. `cancelled` is
    set as soon as its client left, also while that may come back, or azu refuses it. `phase` says where the
    job stands, None once it has ended. `asked` names the request whose connection waits for the job, empty
    where none does. `tools` are those that the prompt offers, as its template takes them.
    """

    job: Job
    state: JobState
    outcome: JobOutcome | None
    attempts: int
    cancelled: bool = False
    delivered: int = 0
    phase: JobPhase | None = None
    asked: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def from_fields(cls, fields: Mapping[str, str]) -> "JobRecord":
        """Read a record's hash."""
        outcome = fields.get("outcome")
        job, state = JOB.validate_json(fields["job"]), JobState(fields["state"])
        delivered = int(fields["delivered"])
        return cls(
            job=job,
            state=state,
            outcome=None if outcome is None else OUTCOME.validate_json(outcome),
            attempts=int(fields["attempts"]),
            cancelled="cancelled" in fields or "left" in fields,
            delivered=delivered,
            phase=phase_now(job, state, fields.get("phase"), delivered),
            asked=fields.get("asked", ""),
            tools=tuple(json.loads(fields.get("tools", "[]"))),
        )


def read_record(job_id: str, fields: Mapping[str, str]) -> JobRecord | AzuError:
    """Return a job's record, or an error where it cannot be read: the other jobs go on."""
    try:
        return JobRecord.from_fields(fields)
    except Exception as error:
        return as_known_error(error, f"the reading of {job_id}")


def phase_now(job: Job, state: JobState, told: str | None, delivered: int) -> JobPhase | None:
    """Return where a job stands; what the scheduler has `told`, some seconds ago, may be over."""
    if state not in (JobState.QUEUED, JobState.RUNNING):
        return None
    known = _phase(told) if told else None
    if known is not None and (not delivered or known.name in ("queued", "recovering")):
        return known
    if delivered:
        return answering(delivered, job.choices * job.sampling.max_tokens)
    if state is JobState.QUEUED:
        return JobPhase("queued", "Waiting to be taken from the queue.")
    return reading(None, len(job.prompt_token_ids))


def _phase(told: str) -> JobPhase | None:
    """Return a phase, None for one that this release does not know: it is only shown."""
    try:
        return PHASE.validate_json(told)
    except ValidationError:
        return None


def record_of(outcome: JobOutcome, created_at_ms: int = 0, choices: int = 1, key_id: str = "") -> JobRecord:
    """Return the record of an ended job of which only the outcome is left: it has no prompt any more."""
    receipt = outcome.receipt
    job = Job(
        job_id=receipt.job_id,
        address=receipt.address,
        model_id=receipt.model_id,
        revision=receipt.revision,
        num_layers=receipt.num_layers,
        prompt_token_ids=(),
        sampling=SamplingParams(max_tokens=max(1, receipt.completion_tokens)),
        reserved_lamports=receipt.charged_lamports + receipt.released_lamports,
        created_at_ms=created_at_ms,
        choices=choices,
        key_id=key_id,
    )
    return JobRecord(job, outcome.state, outcome, attempts=1, delivered=receipt.completion_tokens)


@dataclass(frozen=True, slots=True)
class ChoiceProgress:
    """The written part of one of a job's choices; with a `finish_reason` the choice is complete."""

    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    work: Mapping[int, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobProgress:
    """The point from which a pipeline resumes a job; `cancelled` if its user cancelled it."""

    choices: tuple[ChoiceProgress, ...]
    cancelled: bool

    @property
    def delivered(self) -> int:
        """Completion tokens of all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)

    @classmethod
    def from_events(cls, events: Iterable[TokenEvent], num_choices: int, *, cancelled: bool) -> "JobProgress":
        """Combine the events of a job's token stream, in order."""
        token_ids: list[list[int]] = [[] for _ in range(num_choices)]
        last: dict[int, TokenEvent] = {}
        for event in events:
            token_ids[event.choice] += event.token_ids
            last[event.choice] = event
        choices = [ChoiceProgress()] * num_choices
        for choice, event in last.items():
            choices[choice] = ChoiceProgress(tuple(token_ids[choice]), event.finish_reason, event.work)
        return cls(tuple(choices), cancelled)


def encode_numbers(numbers: tuple[int, ...] | tuple[float, ...]) -> str:
    """Write numbers as words that a Lua script can count and cut; floats, also infinite ones, stay exact."""
    return " ".join(map(str, numbers))


def encode_top_logprobs(top_logprobs: Sequence[Sequence[tuple[int, float]]]) -> str:
    """Write each token's alternatives as one word: `id:logprob` pairs between commas."""
    return " ".join(
        ",".join(f"{token_id}:{logprob}" for token_id, logprob in ranked) or _NO_ALTERNATIVES
        for ranked in top_logprobs
    )


def decode_event(entry_id: str, fields: Mapping[str, str]) -> TokenEvent | JobOutcome:
    """Read one entry of a token stream."""
    if "outcome" in fields:
        return OUTCOME.validate_json(fields["outcome"])
    token_ids = tuple(map(int, fields["tokens"].split()))
    return TokenEvent(
        index=token_count(entry_id) - len(token_ids),
        token_ids=token_ids,
        logprobs=tuple(map(float, fields["logprobs"].split())),
        top_logprobs=tuple(map(_decode_alternatives, fields["top"].split())),
        choice=int(fields["choice"]),
        finish_reason=FinishReason(fields["finish"]) if fields["finish"] else None,
        work=WORK.validate_json(fields["work"]) if fields["work"] else {},
    )


def token_count(entry_id: str) -> int:
    """Return the number of completion tokens up to and including an entry; the entry's id holds it."""
    return int(entry_id.partition("-")[0])


def without_first(event: TokenEvent, after: int) -> TokenEvent:
    """Return an event without the tokens before completion index `after`."""
    known = max(0, after - event.index)
    return replace(
        event,
        index=event.index + known,
        token_ids=event.token_ids[known:],
        logprobs=event.logprobs[known:],
        top_logprobs=event.top_logprobs[known:],
    )


def _decode_alternatives(word: str) -> tuple[tuple[int, float], ...]:
    if word == _NO_ALTERNATIVES:
        return ()
    pairs = (pair.partition(":") for pair in word.split(","))
    return tuple((int(token_id), float(logprob)) for token_id, _, logprob in pairs)
