"""What pieces may say of a step: every answer is checked before anything of it counts. No torch here.

A worker may send anything. The pipeline checks each result against the step that it sent. A stage checks what
comes with a frame: of several stages that pass a false word on, the one before the first honest one is named.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeGuard

from azu.engine.accounting import is_distributed
from azu.engine.scheduler import Sequence
from azu.engine.stage_contract import BadFrame
from azu.errors import FrameError
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import (
    ExpertWork,
    PieceProgress,
    PieceState,
    Replay,
    SampledToken,
    SequenceFault,
    Slice,
    StepBatch,
    StepResult,
)
from azu.protocol.structure import Structure
from azu.protocol.topology import Topology
from azu.protocol.versions import Versions, own_versions

_MOST_CODE_CHARACTERS = 64


class StepCheck:
    """What the pieces of one topology may say of a step."""

    def __init__(self, structure: Structure, topology: Topology) -> None:
        self._vocab_size = structure.vocab_size
        self._spans = [stage.span for stage in topology.stages]
        self._last = len(self._spans) - 1
        self._nodes: dict[int, frozenset[str]] = {}  # layer -> the nodes that compute in it
        self._chosen: dict[int, int] = {}  # layer with distributed experts -> the choices of each token
        # How many of them each holder can serve: no token chooses an expert twice.
        self._served: dict[tuple[int, int | None], int] = {}
        for stage in topology.stages:
            for layer in structure.layers[stage.span.start : stage.span.end]:
                index, chosen = layer.index, layer.experts_per_token
                sets = [one for one in topology.expert_sets if index in one.experts]
                self._nodes[index] = frozenset({stage.node_id, *(one.node_id for one in sets)})
                if is_distributed(layer, stage):
                    self._chosen[index] = chosen
                    self._served[index, None] = min(chosen, len(stage.experts.get(index, ())))
                    self._served |= {(index, one.index): min(chosen, len(one.experts[index])) for one in sets}

    def check_form(self, result: object) -> None:
        """Check that a result names a step; raises BadFrame, which names the last stage."""
        if not isinstance(result, StepResult) or not type(result.epoch) is type(result.step) is int:
            raise BadFrame(self._last, "it is no answer to a step")
        if not isinstance(result.versions, Versions) or result.versions.common(own_versions()) is None:
            raise BadFrame(self._last, "it is of a release of azu that is not understood here")

    def check_result(
        self,
        result: StepResult,
        micro_batch: int,
        chosen: Collection[tuple[Sequence, Slice]],
        replay: Replay | None,
    ) -> None:
        """Check the answer to a step of these slices; raises BadFrame, which names the stage that sent it."""
        first, last = (replay.first, replay.last) if replay else (0, self._last)
        stopped = result.stopped_at
        sender = stopped if _is_count(stopped, first, last) else last
        with _refusal(lambda fault: BadFrame(sender, fault)):
            num_tokens = {slice_.sequence_id: slice_.num_tokens for _, slice_ in chosen}
            failed = self._failed(result.faults, self._spans[last].end)
            _require(result.micro_batch == micro_batch, "it is of another micro-batch")
            _require(stopped in (None, sender), "it stopped at a stage that it did not reach")
            _require(stopped is None or failed == num_tokens.keys(), "it stopped although a sequence went on")
            _require(failed <= num_tokens.keys(), "a sequence failed that is not in the step")
            is_part = result.most_tokens is None or _is_count(result.most_tokens, 1, sum(num_tokens.values()))
            _require(is_part, "it ran in parts that are none of the step")
            sampled = {one.sequence_id: one.sampling for one, slice_ in chosen if slice_.sample}
            self._check_tokens(result.tokens, {key: sampled[key] for key in sampled.keys() - failed})
            layers = range(self._spans[first].start, self._spans[last].end)
            self._check_work(result.expert_work, layers, num_tokens, failed)

    def check_relayed(self, batch: StepBatch, stage: int) -> None:
        """Check what a step brings to a stage from those before it; raises FrameError."""
        with _refusal(FrameError):
            num_tokens = {slice_.sequence_id: slice_.num_tokens for slice_ in batch.slices}
            first, end = batch.replay.first if batch.replay else 0, self._spans[stage].start
            failed = self._failed(batch.faults, end)
            _require(len(num_tokens) == len(batch.slices), "a sequence is in it twice")
            _require(failed.isdisjoint(num_tokens), "a sequence goes on that has failed")
            is_part = batch.most_tokens is None or _is_count(batch.most_tokens, 1)
            _require(is_part, "it ran in parts that are none of the step")
            self._check_work(batch.expert_work, range(self._spans[first].start, end), num_tokens, failed)

    def _failed(self, faults: Iterable[SequenceFault], end: int) -> frozenset[int]:
        """Check faults of layers up to `end`, and return their sequences."""
        failed = set()
        for fault in faults:
            _require(fault.sequence_id not in failed, "a sequence failed twice")
            failed.add(fault.sequence_id)
            _require(type(fault.code) is str and type(fault.message) is str, "a fault says nothing")
            _require(fault.code.isidentifier() and len(fault.code) <= _MOST_CODE_CHARACTERS, "a fault's code")
            if fault.node_id is not None:
                is_known = _is_count(fault.layer, 0, end - 1) and fault.node_id in self._nodes[fault.layer]
                _require(is_known, "it blames a node that computes nothing in the layer")
        return frozenset(failed)

    def _check_tokens(self, tokens: Iterable[SampledToken], wanted: Mapping[int, SamplingParams]) -> None:
        """Check that each sequence that samples has its token."""
        missing = dict(wanted)
        for token in tokens:
            # One for each slice. A slice that carries guessed tokens would take as many as it carries.
            sampling = missing.pop(token.sequence_id, None)
            if sampling is None:
                raise FrameError("a token that was not asked for")
            _require(self._is_token(token.token_id), "a token that is not in the vocabulary")
            top = token.top_logprobs
            if sampling.logprobs is None:
                _require(token.logprob is None and not top, "log probabilities that were not asked for")
                continue
            _require(_is_logprob(token.logprob), "a log probability that is not finite")
            num_top = min(sampling.logprobs, self._vocab_size)
            _require(len(dict(top)) == len(top) == num_top, f"not {num_top} other tokens")
            are_fine = all(self._is_token(token_id) and _is_logprob(value) for token_id, value in top)
            _require(are_fine, "a log probability that is not finite, or of no token")
        _require(not missing, f"{len(missing)} sequences got no token")

    def _check_work(
        self,
        work: Collection[ExpertWork],
        layers: range,
        num_tokens: Mapping[int, int],
        failed: Collection[int],
    ) -> None:
        """Check that the choices of each token in each of the layers were served once, where it did not fail.

        The tokens of a sequence that failed before are unknown.
        """
        totals: dict[int, dict[int, int]] = {layer: {} for layer in layers if layer in self._chosen}
        by_holder: dict[tuple[int, int | None], dict[int, int]] = {}
        for entry in work:
            layer, expert_set = entry.layer, entry.expert_set
            is_known = _is_count(layer) and (expert_set is None or _is_count(expert_set))
            _require(is_known and layer in totals, "work in a layer whose experts are not distributed")
            most = self._served.get((layer, expert_set), 0)
            _require(most > 0, "work of a holder that has no expert of the layer")
            served, total = by_holder.setdefault((layer, expert_set), {}), totals[layer]
            for sequence_id, choices in entry.choices.items():
                if not type(sequence_id) is type(choices) is int or choices < 1:
                    raise FrameError("work that is not counted")
                served[sequence_id] = own = served.get(sequence_id, 0) + choices
                total[sequence_id] = total.get(sequence_id, 0) + choices
                if sequence_id in num_tokens:
                    if own > most * num_tokens[sequence_id]:
                        raise FrameError("more work than a holder's experts can have")
                elif sequence_id not in failed:
                    raise FrameError("work for a sequence that is not in the step")
        for layer, total in totals.items():
            each = self._chosen[layer]
            for sequence_id, tokens in num_tokens.items():
                choices = total.get(sequence_id, 0)
                if choices != tokens * each and (choices > tokens * each or sequence_id not in failed):
                    raise FrameError(f"work for {choices} of {tokens * each} choices in layer {layer}")

    def _is_token(self, token_id: object) -> bool:
        return _is_count(token_id, 0, self._vocab_size - 1)


def check_progress(answer: object) -> PieceProgress:
    """Return what a piece says of how far it is; raises FrameError for anything else."""
    if not isinstance(answer, PieceProgress) or not isinstance(answer.state, PieceState):
        raise FrameError("it does not say how far it is")
    seconds = (answer.slowdown, 0.0 if answer.expected_s is None else answer.expected_s)
    is_fine = _is_count(answer.step) and _is_count(answer.num_layers) and all(map(_is_amount, seconds))
    _require(is_fine, "it says that it is where no piece can be")
    return answer


def check_counts(answer: object) -> Mapping[int, int]:
    """Return how many rows a stage says it can send again of which sequences; raises FrameError."""
    if type(answer) is dict and all(_is_count(key) and _is_count(n) for key, n in answer.items()):
        return answer
    raise FrameError("it does not say what it can send again")


def check_chosen(answer: object) -> Mapping[int, tuple[int, ...]]:
    """Return how often a stage says each expert of its layers was chosen; raises FrameError."""
    with _refusal(FrameError):
        assert isinstance(answer, Mapping)
        found = {layer: tuple(counts) for layer, counts in answer.items()}
        _require(all(_is_count(one) for counts in found.values() for one in counts), "no counts")
        return found


@contextmanager
def _refusal(refused: Callable[[str], FrameError]) -> Iterator[None]:
    """Have a check raise `refused` with the fault, also where a part is of no type that can be checked."""
    try:
        yield
    except FrameError as error:
        raise refused(error.message) from error
    except Exception as error:
        raise refused(f"its parts are malformed ({type(error).__name__})") from error


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise FrameError(fault)


def _is_count(value: object, least: int = 0, most: float = math.inf) -> TypeGuard[int]:
    # Equal values of other types, such as True and 1.0, would become keys of the work that is paid.
    return type(value) is int and least <= value <= most


def _is_amount(value: object) -> bool:
    return type(value) is float and 0 <= value < math.inf


def _is_logprob(value: object) -> bool:
    return type(value) is float and math.isfinite(value)
