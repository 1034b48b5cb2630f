"""The loop of a model's sequences: steps for the first stage, token ids from the last. No torch here."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from azu.engine.accounting import Work, WorkAccount
from azu.engine.expert_counts import Difference, Received, ReportedStep
from azu.engine.opening import opened, seen
from azu.engine.scheduler import BatchScheduler, SchedulerConfig, Sequence, SequenceState
from azu.engine.step_check import StepCheck
from azu.errors import AzuError, InternalError, NumericsError, error_classes
from azu.logs import log_context
from azu.protocol.job import FinishReason, TokenEvent
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import (
    OpenedSequence,
    Replay,
    SampledToken,
    SeenTokens,
    SequenceFault,
    Slice,
    StepBatch,
    StepResult,
)
from azu.protocol.structure import Structure
from azu.protocol.topology import Topology
from azu.supervision import as_known_error

Chosen = tuple[tuple[Sequence, Slice], ...]


class EnginePipeline:
    """Schedules the sequences of one deployment and counts what ran; its owner moves the bytes.

    New tokens are returned by sequence id, as events whose `index` and `choice` the owner sets: it knows the
    job. `num_completed` counts the steps that brought sequences on, `num_returned` replays too.
    """

    def __init__(
        self,
        structure: Structure,
        topology: Topology,
        config: SchedulerConfig,
        ends: Collection[int],
    ) -> None:
        self._epoch = topology.epoch
        self._num_blocks = config.num_blocks
        self._scheduler = BatchScheduler(config, len(topology.stages), structure.restart_length)
        self._account = WorkAccount(structure, topology)
        self._structure = structure
        self._check = StepCheck(structure, topology)
        self._ends = frozenset(ends)
        self._sequences: dict[int, Sequence] = {}
        self._in_flight: dict[int, _Step] = {}
        self._replays: deque[tuple[Replay, Chosen]] = deque()
        self._unfilled: set[int] = set()  # stages whose replays are not all through
        self._suspended = False
        self._struck: dict[int, int] = {}
        self._alone: set[int] = set()  # each shares no step with another until it comes further
        self._opened: set[int] = set()  # stages know of them
        self._reopen: set[int] = set()  # and the last one may know too much, or nothing
        self._closed: list[int] = []
        self._steps = 0
        self.num_completed = 0
        self.num_returned = 0

    @property
    def num_sequences(self) -> int:
        """Sequences that have not finished."""
        return len(self._sequences)

    def presumed_work(self, prompt_tokens: int, completion_tokens: int) -> Work:
        """Return the work of a completion that an earlier pipeline left no record of."""
        return self._account.estimated(prompt_tokens, completion_tokens)

    def take_reported(self) -> tuple[ReportedStep, ...]:
        """Return what routers said of expert sets in each step since the last call."""
        return self._account.take_reported()

    def compare(
        self, reported: Iterable[ReportedStep], received: Mapping[int, Received]
    ) -> list[tuple[ReportedStep, Difference]]:
        """Have the smaller number count where expert sets, by index, say otherwise; return these places."""
        return [(one, found) for one in reported for found in self._account.compare(one, received)]

    def taken_back(self, sequence_id: int) -> Work:
        """Return, once, by how much the work of a sequence that ended has changed since; see `compare`."""
        return self._account.taken_back(sequence_id)

    @property
    def num_waiting(self) -> int:
        """Those of them that hold no blocks yet, or no longer."""
        return len(self._scheduler.waiting)

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that no sequence holds, the same on every stage."""
        return self._scheduler.num_free_blocks

    @property
    def num_cached(self) -> Mapping[int, int]:
        """How many tokens of each running sequence are in the KV caches, as far as nothing is in flight."""
        return {key: one.num_scheduled for key, one in self._sequences.items() if one.num_scheduled}

    @property
    def positions(self) -> Mapping[int, tuple[int, bool]]:
        """A number for each job's sequence that changes when it comes further; whether it has KV blocks."""
        return {
            key: (one.num_scheduled + one.num_ran + one.num_generated, one.state is SequenceState.RUNNING)
            for key, one in self._sequences.items()
            if not one.is_background
        }

    @property
    def queue(self) -> tuple[int, ...]:
        """The jobs' sequences that wait for KV blocks, the next one first."""
        return tuple(one.sequence_id for one in self._scheduler.waiting if not one.is_background)

    @property
    def prompts(self) -> Mapping[int, tuple[int, int]]:
        """How many prompt tokens ran of each job's sequence without a token, and how many it has."""
        return {
            key: (min(one.num_ran, one.num_prompt), one.num_prompt)
            for key, one in self._sequences.items()
            if not one.num_generated and not one.is_background
        }

    @property
    def unfilled_stages(self) -> frozenset[int]:
        """Stages that were lost and are not filled yet, after a `suspend` that came too early for it."""
        return frozenset(self._unfilled)

    @property
    def struck(self) -> Mapping[int, int]:
        """How many tokens ever ran of each sequence that had a step in flight at the last `suspend`."""
        return self._struck

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises Unavailable when the KV cache could not hold it even alone."""
        assert sequence.sequence_id not in self._sequences, "a sequence id is used once"
        self._scheduler.add(sequence)
        self._sequences[sequence.sequence_id] = sequence

    def takes(self, prompt: Collection[int]) -> bool:
        """Say whether a prompt is one of this model: of its vocabulary, and not almost too long."""
        structure = self._structure
        fits = 0 < len(prompt) <= structure.context_length // 2
        return fits and max(prompt) < structure.vocab_size

    def cancel(self, sequence_id: int) -> dict[int, TokenEvent]:
        """End a sequence now; what is in flight of it is ignored later. Unknown ids change nothing."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return {}
        # What ran again after a loss or a preemption counts once.
        ran, work = min(sequence.num_ran, sequence.num_prompt), self._finish(sequence)
        event = TokenEvent(0, (), finish_reason=FinishReason.CANCELLED, work=work, prompt_tokens_ran=ran)
        return {sequence_id: event}

    def suspend(self) -> None:
        """Schedule nothing until `resume`, and forget what is in flight: it will not be waited for.

        Every sequence stands where its last completed step left it.
        """
        self._suspended = True
        self._replays.clear()
        for step in self._in_flight.values():
            self._struck |= {sequence.sequence_id: sequence.num_ran for sequence, _ in step.chosen}
            self._closed += step.closed
            for sequence, slice_ in () if step.replay else step.chosen:
                self._scheduler.rewind(sequence, slice_.position)
        self._in_flight.clear()
        self._reopen.update(self._sequences)

    @property
    def num_preempted(self) -> int:
        """How often a sequence lost its blocks to others and had to be computed again."""
        return self._scheduler.num_preempted

    def limit(self, num_blocks: int) -> int:
        """Take no sequence that `num_blocks` would not hold alone; return how many are needed still."""
        return self._scheduler.limit(num_blocks)

    def resume(
        self,
        topology: Topology,
        lost_stages: Collection[int],
        num_sent: Mapping[int, Mapping[int, int]],
        alone: Collection[int] = (),
    ) -> None:
        """Go on under another topology, in which some stages begin with empty KV caches.

        Every other stage has the span that it had, in its old place.

        Where it has another number of blocks, sequences that lose theirs are computed again.
        `num_sent[stage]` has how many rows of each sequence the stage before a lost one can send again; what
        no stage can send again is computed from the tokens. Unfilled stages count as lost again. Each of the
        sequences `alone` is computed from its tokens and is the only one in flight until it comes further.
        """
        assert self._suspended, "suspend() comes first"
        self._suspended = False
        self._struck.clear()
        self._alone = set(alone)
        self._epoch = topology.epoch
        self._account.set_topology(topology)
        self._check = StepCheck(self._structure, topology)
        self._scheduler.set_num_stages(len(topology.stages))
        if topology.num_blocks != self._num_blocks:
            self._num_blocks = topology.num_blocks
            self._scheduler.resize(topology.num_blocks)
        self._unfilled.update(lost_stages)
        self._unfilled.intersection_update(range(len(topology.stages)))
        replays = _neighbours(self._unfilled)
        cached = {key: self._sequences[key] for key in self.num_cached}
        for key in list(cached):
            senders = [num_sent.get(replay.first - 1, {}) for replay in replays if replay.first]
            if key in self._alone or any(sent.get(key, 0) < cached[key].num_scheduled for sent in senders):
                self._scheduler.rewind(cached.pop(key), 0)
        self._replays.extend(
            (replay, chosen) for replay in replays for chosen in self._scheduler.replays(cached.values())
        )
        if not self._replays:
            self._unfilled.clear()

    def next_batch(self) -> StepBatch | None:
        """Return the next step, None when there is none before another completes.

        A replay goes to the stage before the first that it fills, anything else to the first stage.
        """
        if self._suspended or len(self._in_flight) >= self._scheduler.micro_batches:
            return None
        if self._replays:
            return self._send(*self._replays.popleft())
        if any(step.replay for step in self._in_flight.values()):
            return None  # it takes another way: a step sent behind it might come before it
        while self._alone and not self._in_flight:
            first = min(self._alone)
            alone = self._sequences.get(first)
            if alone is not None and (chosen := self._scheduler.next_slices(alone)):
                return self._send(None, tuple(chosen))
            self._alone.remove(first)
        if self._alone:
            return None
        chosen = self._scheduler.next_slices()
        return self._send(None, tuple(chosen)) if chosen else None

    def seen_by(self, batch: StepBatch) -> tuple[SeenTokens, ...]:
        """Return what the last stage has to know before the step that `next_batch` just returned.

        No other stage may get it: a step carries no token past the first stage.
        """
        found = (seen(*_parts(self._sequences[one.sequence_id])) for one in batch.opened)
        return tuple(one for one in found if one is not None)

    def waits_for(self, batch: StepBatch) -> bool:
        """Say whether a step is still in flight: a `suspend` forgets it."""
        return batch.epoch == self._epoch and batch.step in self._in_flight

    def complete(self, result: StepResult) -> dict[int, TokenEvent]:
        """Take a step back from the last stage; one of another epoch or not in flight changes nothing.

        Whatever goes wrong with a sequence ends that sequence, and no other. Raises BadFrame, which names
        the stage that sent it, for an answer that is not one to the step: it changes nothing either.
        """
        self._check.check_form(result)
        step = self._in_flight.get(result.step)
        if result.epoch != self._epoch or step is None:
            return {}
        self._check.check_result(result, step.micro_batch, step.chosen, step.replay)
        del self._in_flight[result.step]
        self.num_returned += 1
        if result.most_tokens is not None:
            self._scheduler.shorten_steps(result.most_tokens)
        if step.replay:
            if not self._replays and not self._in_flight:
                self._unfilled.clear()
            return self._faults(step, result)
        self.num_completed += 1
        paid = {sequence.sequence_id for sequence, slice_ in step.chosen if self._returned(sequence, slice_)}
        self._account.add_expert_work(result.step, result.expert_work, paid)
        return self._faults(step, result) | {
            token.sequence_id: self._sampled(sequence, token)
            for token in result.tokens
            if (sequence := self._sequences.get(token.sequence_id)) is not None
        }

    def _faults(self, step: "_Step", result: StepResult) -> dict[int, TokenEvent]:
        if result.faults:
            # A stage that could not pass the step on kept from the later ones which sequences are over.
            self._closed += step.closed
        return {
            fault.sequence_id: self._failed(sequence, _error(fault))
            for fault in result.faults
            if (sequence := self._sequences.get(fault.sequence_id)) is not None
        }

    def _send(self, replay: Replay | None, chosen: Chosen) -> StepBatch:
        self._steps += 1
        taken = {step.micro_batch for step in self._in_flight.values()}
        micro_batch = min(set(range(self._scheduler.micro_batches)) - taken)
        closed: tuple[int, ...] = ()
        new: tuple[OpenedSequence, ...] = ()
        if replay is None:
            closed, self._closed = tuple(self._closed), []
            new = self._open(sequence for sequence, _ in chosen)
        self._in_flight[self._steps] = _Step(micro_batch, chosen, closed, replay)
        return StepBatch(
            epoch=self._epoch,
            step=self._steps,
            micro_batch=micro_batch,
            slices=tuple(slice_ for _, slice_ in chosen),
            token_ids=() if replay and replay.first else _tokens(chosen),
            opened=new,
            closed=closed,
            replay=replay,
        )

    def _returned(self, sequence: Sequence, slice_: Slice) -> bool:
        """Take one slice back; say if it is paid for.

        It is not if it was computed before, if its sequence has ended, or in the background.
        """
        self._scheduler.slice_returned(sequence)
        if slice_.position < sequence.num_ran or sequence.sequence_id not in self._sequences:
            return False
        sequence.num_ran = slice_.position + slice_.num_tokens
        self._alone.discard(sequence.sequence_id)
        if sequence.is_background:
            return False
        self._account.add_tokens(sequence.sequence_id, slice_.num_tokens)
        return True

    def _sampled(self, sequence: Sequence, token: SampledToken) -> TokenEvent:
        self._scheduler.extend(sequence, token.token_id)
        try:
            reason = self._finish_reason(sequence, token.token_id)
        except Exception as error:
            with log_context(sequence_id=sequence.sequence_id):
                return self._failed(sequence, as_known_error(error, "the search for stop strings"))
        return TokenEvent(
            index=0,
            token_ids=(token.token_id,),
            logprobs=() if token.logprob is None else (token.logprob,),
            top_logprobs=() if token.logprob is None else (token.top_logprobs,),
            finish_reason=reason,
            work={} if reason is None else self._finish(sequence),
        )

    def _failed(self, sequence: Sequence, error: AzuError) -> TokenEvent:
        work = self._finish(sequence)
        return TokenEvent(0, (), finish_reason=FinishReason.ERROR, work=work, error=error)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.sampling
        if sequence.ends_with(token_id) or token_id in sampling.stop_token_ids:
            return FinishReason.STOP
        if token_id in self._ends and not sampling.ignore_eos:
            return FinishReason.STOP
        return FinishReason.LENGTH if sequence.num_generated >= sampling.max_tokens else None

    def _finish(self, sequence: Sequence) -> Work:
        del self._sequences[sequence.sequence_id]
        self._scheduler.finish(sequence)
        self._reopen.discard(sequence.sequence_id)
        if sequence.sequence_id in self._opened:
            self._opened.remove(sequence.sequence_id)
            self._closed.append(sequence.sequence_id)
        return self._account.close(sequence.sequence_id)

    def _open(self, sequences: Iterable[Sequence]) -> tuple[OpenedSequence, ...]:
        new = [
            sequence
            for sequence in sequences
            if sequence.sequence_id not in self._opened or sequence.sequence_id in self._reopen
        ]
        self._opened.update(sequence.sequence_id for sequence in new)
        self._reopen.difference_update(sequence.sequence_id for sequence in new)
        ends = tuple(self._ends)
        return tuple(opened(*_parts(sequence), ends) for sequence in new)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step on its way."""

    micro_batch: int
    chosen: Chosen
    closed: tuple[int, ...]
    replay: Replay | None


def _error(fault: SequenceFault) -> AzuError:
    if fault.node_id is not None:
        return NumericsError(fault.message, node_id=fault.node_id, layer=fault.layer)
    # A worker does not choose the class of a job's error: its client would ask again, or change its key.
    is_own = any(kind.default_code == fault.code for kind in error_classes(InternalError))
    return InternalError(fault.message, code=fault.code if is_own else None)


def _parts(sequence: Sequence) -> tuple[int, list[int], SamplingParams, tuple[int, ...]]:
    prompt = sequence.token_ids[: sequence.num_prompt]
    return sequence.sequence_id, prompt, sequence.sampling, sequence.generated


def _tokens(chosen: Chosen) -> tuple[int, ...]:
    return tuple(
        token
        for sequence, slice_ in chosen
        for token in sequence.token_ids[slice_.position : slice_.position + slice_.num_tokens]
    )


def _neighbours(stages: Collection[int]) -> list[Replay]:
    """Return the runs of consecutive stages."""
    replays: list[Replay] = []
    for stage in sorted(stages):
        if replays and replays[-1].last == stage - 1:
            replays[-1] = Replay(replays[-1].first, stage)
        else:
            replays.append(Replay(stage, stage))
    return replays
