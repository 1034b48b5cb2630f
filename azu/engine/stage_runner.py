"""One stage of a model at work: it checks the frame that arrives, runs the step, and returns a frame.

It also keeps the hidden states that it sent, for a next stage that is lost and has to fill its KV cache
again.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from azu.engine.experts import (
    DistributedExperts,
    DistributedLayer,
    ExpertLink,
    HeldExperts,
    StepContext,
    StepId,
)
from azu.engine.kv import PagedKV
from azu.engine.layout import Layout, LayoutBuilder
from azu.engine.malloc import give_back
from azu.engine.out_of_memory import StepPart, run_in_parts
from azu.engine.sampler import Sampler
from azu.engine.stage import BuiltStage, build_stage
from azu.engine.stage_contract import BadFrame, Handoff, OldEpoch, StageSpec, fault_of
from azu.engine.step_check import StepCheck
from azu.engine.tensors import all_finite, dtype_named, payload_of, tensor_of
from azu.errors import NUMERICS_ERROR, AzuError, FrameError, WorkerLost
from azu.models.skeleton import replace_module
from azu.protocol.frame import Frame, FrameRow
from azu.protocol.step import (
    ExpertWork,
    SampledToken,
    SeenTokens,
    SequenceFault,
    Slice,
    StepBatch,
    StepResult,
)
from azu.protocol.topology import Topology
from azu.protocol.versions import own_versions

log = logging.getLogger(__name__)

_Compute = Callable[[Tensor, Layout], Tensor]


class StageRunner:
    """Runs steps through the layers of one stage, one at a time, in the order in which they arrive."""

    def __init__(
        self,
        spec: StageSpec,
        experts: ExpertLink | None = None,
        *,
        on_logits: Callable[[Sequence[int], Tensor], None] | None = None,
    ) -> None:
        """Load the stage; `on_logits` gets the sequence ids and logits [n, vocabulary] of each sample."""
        self._spec = spec
        self._device = torch.device(spec.device)
        self._on_logits = on_logits
        span = spec.stage.span
        built = build_stage(
            spec.structure, span, spec.stage.experts, spec.shard_paths, spec.config_folder, self._device
        )
        self._model = built.model
        topology = spec.topology
        self._check = StepCheck(spec.structure, topology)
        self._kv = PagedKV(len(span), topology.num_blocks, topology.block_size)
        self._layouts = LayoutBuilder(topology.num_blocks, topology.block_size, self._device)
        self._sampler = Sampler()
        self._sent = SentLog(spec.structure.hidden_size * spec.structure.dtype_bytes, spec.sent_log_bytes)
        self._context = StepContext()
        self._lock = threading.Lock()
        self._last_step = 0
        self._is_last = span.end == spec.structure.num_layers
        self._distributed_layers = [
            self._distribute(built, layer, held, experts) for layer, held in built.distributed.items()
        ]

    def watch_layers(self, done: Callable[[], None]) -> None:
        """Have `done` called after each layer that runs."""
        for layer in self._model.layers:
            layer.register_forward_hook(lambda *_: done())

    def run(self, batch: StepBatch, frame: bytes | None) -> Handoff | StepResult:
        """Run one step: the first stage takes tokens from the batch, the others hidden states from the frame.

        The stage before the stages that a replay fills sends what it sent before. Raises OldEpoch for a step
        of an older topology, and FrameError for any other step that this stage cannot run; a BadFrame names
        the stage that sent it. Any other exception is the fault of the sequences that raise it when they run
        alone, else of all that are in the step.
        """
        with self._lock, torch.inference_mode():
            try:
                return self._run(batch, frame)
            except AzuError:
                raise
            except Exception as error:
                if batch.slices:
                    self._try_zeros(batch)
                faults = [fault_of(one.sequence_id, error, self._failure) for one in batch.slices]
                failed = replace(batch, faults=(*batch.faults, *faults))
                return replace(_result(failed, ()), stopped_at=self._spec.stage.index)

    def _run(self, batch: StepBatch, frame: bytes | None) -> Handoff | StepResult:
        self._refuse_epoch(batch)
        self._sent.drop(batch.closed)
        if batch.replay is not None and self._spec.stage.index < batch.replay.first:
            return Handoff(batch, self._frame(batch, self._kept(batch)))
        rows = self._tokens(batch, frame) if self._spec.stage.index == 0 else self._received(batch, frame)
        self._last_step = batch.step
        if not batch.slices and not batch.faults:
            raise FrameError(f"step {batch.step} is empty")
        if self._is_last:
            return self._finish(*self._computed(batch, rows, self._logits))
        return self._hand_on(*self._computed(batch, rows, self._hidden))

    def relink(self, topology: Topology, experts: ExpertLink | None) -> None:
        """Use a topology with a higher epoch, in which this stage has the same layers and experts.

        Waits for the current step. Steps of the older topology are refused from now on.
        """
        with self._lock:
            before = self._spec.topology
            assert topology.epoch > before.epoch, "each topology has a higher epoch"
            self._last_step = 0
            if topology.num_blocks != before.num_blocks:
                self._kv.resize(topology.num_blocks)
                give_back(self._device.type)
                self._layouts = LayoutBuilder(topology.num_blocks, topology.block_size, self._device)
            self._spec = replace(self._spec, topology=topology)
            self._check = StepCheck(self._spec.structure, topology)
            for module in self._distributed_layers:
                assert experts is not None, "the distributed experts need a link"
                module.relink(topology.expert_sets, experts)

    def forget_sequences(self) -> None:
        """Drop the state of every sequence: a new pipeline will open its own."""
        with self._lock:
            self._sent.clear()
            self._sampler.clear()

    def see(self, sequences: Sequence[SeenTokens]) -> None:
        """Store tokens that this stage's penalties look at, before the step that opens their sequences."""
        self._sampler.see(sequences)

    def num_sent(self, sequence_ids: Sequence[int]) -> Mapping[int, int]:
        """Return how many rows of hidden states can be sent again, for each sequence with such rows."""
        with self._lock:
            return self._sent.num_rows(sequence_ids)

    def num_chosen(self) -> Mapping[int, Sequence[int]]:
        """Return how often each expert was chosen, for the layers with distributed experts."""
        return {module.layer: module.num_chosen for module in self._distributed_layers}

    def _computed(self, batch: StepBatch, rows: Tensor, compute: _Compute) -> tuple[StepBatch, Tensor]:
        """Run rows, in parts when memory runs out; return the step for the next stage, and finite outputs.

        A sequence that fails, or whose outputs are not finite, also when it runs alone, leaves the step as a
        fault.
        """
        if not batch.slices:
            return batch, rows
        ran = list(self._isolated(batch, StepPart(batch.slices, rows), compute))
        if all(isinstance(one, SequenceFault) for _, one in ran):
            self._try_zeros(batch)
        slices: list[Slice] = []
        outs: list[Tensor] = []
        faults, work, most_tokens = list(batch.faults), list(batch.expert_work), batch.most_tokens
        for part, one in ran:
            if isinstance(one, SequenceFault):
                faults.append(one)
                continue
            if one.num_tokens < len(part.rows):
                most_tokens = min(one.num_tokens, most_tokens or one.num_tokens)
            for own, finite in self._finite(batch, part, one, compute):
                if isinstance(finite, SequenceFault):
                    faults.append(finite)
                else:
                    slices += own
                    outs.append(finite.out)
                    work += finite.work
        batch = replace(
            batch,
            slices=tuple(slices),
            faults=tuple(faults),
            expert_work=tuple(work),
            most_tokens=most_tokens,
        )
        return batch, _joined(outs) if outs else rows[:0]

    def _isolated(
        self, batch: StepBatch, part: StepPart, compute: _Compute
    ) -> "Iterator[tuple[StepPart, _Ran | SequenceFault]]":
        """Run a part, or its halves where it fails, down to the single sequences that fail."""
        try:
            yield part, self._ran(batch, part, compute)
        except AzuError:
            raise
        except Exception as error:
            if len(part.slices) == 1:
                yield part, fault_of(part.slices[0].sequence_id, error, self._failure)
                return
            log.warning("%d sequences failed together: they run apart", len(part.slices), exc_info=True)
            for half in part.halves() or ():
                yield from self._isolated(batch, half, compute)

    def _ran(self, batch: StepBatch, whole: StepPart, compute: _Compute) -> "_Ran":
        def run(part: StepPart) -> _Ran:
            layout = self._layout(part.slices)
            self._context.begin(self._step_id(batch), layout)
            out = compute(part.rows, layout)
            return _Ran(out, len(part.rows), self._context.work, self._context.lost)

        parts = run_in_parts(run, whole, StepPart.halves, self._device.type)
        return _Ran(
            _joined([part.out for part in parts]),
            max(part.num_tokens for part in parts),
            tuple(one for part in parts for one in part.work),
            frozenset().union(*(part.lost for part in parts)),
        )

    def _finite(
        self, batch: StepBatch, part: StepPart, ran: "_Ran", compute: _Compute
    ) -> "Iterator[tuple[tuple[Slice, ...], _Ran | SequenceFault]]":
        """Yield a part's outputs; sequences without finite ones run again alone, and may be at fault."""
        if ran.is_finite:
            yield part.slices, ran
            return
        sizes = [slice_.num_tokens for slice_ in part.slices]
        out_sizes = [int(slice_.sample) for slice_ in part.slices] if self._is_last else sizes
        for slice_, rows, out in zip(
            part.slices, torch.split(part.rows, sizes), torch.split(ran.out, out_sizes), strict=True
        ):
            own = ran.of(slice_.sequence_id, out)
            yield (slice_,), own if own.is_finite else self._alone(batch, StepPart((slice_,), rows), compute)

    def _alone(self, batch: StepBatch, own: StepPart, compute: _Compute) -> "_Ran | SequenceFault":
        sequence_id = own.slices[0].sequence_id
        with _not_finite(self._model.layers) as places:
            try:
                ran = self._ran(batch, own, compute)
            except AzuError:
                raise
            except Exception as error:
                return fault_of(sequence_id, error, self._failure)
        if ran.is_finite:
            return ran
        stage, dtype = self._spec.stage, self._spec.structure.dtype
        layer = stage.span.start + places[0] if places else stage.span.end - 1
        advice = "serve this model in bfloat16" if dtype == "float16" else "its checkpoint may be damaged"
        return SequenceFault(
            sequence_id,
            code=NUMERICS_ERROR,
            message=f"layer {layer} computed values for this text that are not finite in {dtype}; {advice}",
            node_id=self._context.not_finite.get(layer, stage.node_id),
            layer=layer,
        )

    def _try_zeros(self, batch: StepBatch) -> None:
        """Compute zeros in the place of a sequence that failed; raises WorkerLost where that fails too.

        Then the stage is broken, and no sequence is at fault.
        """
        stage, structure = self._spec.stage, self._spec.structure
        one = Slice(0, 0, 1, batch.slices[0].block_ids, sample=False, sequence_length=1)
        shape, dtype = (
            ((1,), torch.long)
            if stage.index == 0
            else ((1, structure.hidden_size), dtype_named(structure.dtype))
        )
        try:
            zeros = torch.zeros(shape, dtype=dtype, device=self._device)
            self._ran(batch, StepPart((one,), zeros), self._hidden)
        except AzuError:
            raise
        except Exception as error:
            raise WorkerLost(f"stage {stage.index} cannot compute any more") from error

    @property
    def _failure(self) -> str:
        span = self._spec.stage.span
        return f"layers {span.start} to {span.end - 1} for a sequence"

    def _hidden(self, rows: Tensor, layout: Layout) -> Tensor:
        return self._model.hidden(rows, layout, self._kv)

    def _logits(self, rows: Tensor, layout: Layout) -> Tensor:
        places = [index for index, slice_ in enumerate(layout.slices) if slice_.sample]
        return self._model.logits(rows, layout, self._kv, layout.last_rows[places])

    def _hand_on(self, batch: StepBatch, hidden: Tensor) -> Handoff | StepResult:
        payload = payload_of(hidden)
        self._sent.record(batch.slices, payload)
        if batch.replay is not None and self._spec.stage.index == batch.replay.last:
            return _result(batch, ())
        return Handoff(replace(batch, token_ids=()), self._frame(batch, payload))

    def _kept(self, batch: StepBatch) -> bytes:
        rows = self._sent.rows(batch.slices)
        if rows is None:
            raise FrameError(f"stage {self._spec.stage.index} did not keep what step {batch.step} asks for")
        return rows

    def _finish(self, batch: StepBatch, logits: Tensor) -> StepResult:
        self._sampler.open(batch.opened)
        sequence_ids = [slice_.sequence_id for slice_ in batch.slices if slice_.sample]
        if self._on_logits is not None and sequence_ids:
            self._on_logits(sequence_ids, logits)
        tokens, faults = self._sampler.sample(sequence_ids, logits) if sequence_ids else ((), ())
        self._sampler.close(batch.closed)
        return _result(replace(batch, faults=(*batch.faults, *faults)), tokens)

    def _tokens(self, batch: StepBatch, frame: bytes | None) -> Tensor:
        if frame is not None:
            raise FrameError(f"step {batch.step} came with a frame to the first stage")
        self._refuse_repeated(batch)
        ids, vocab_size = batch.token_ids, self._spec.structure.vocab_size
        if not ids or len(ids) != batch.num_tokens or not 0 <= min(ids) <= max(ids) < vocab_size:
            raise FrameError(
                f"step {batch.step}: its token ids are not {batch.num_tokens} of the vocabulary's"
            )
        return torch.tensor(ids, device=self._device)

    def _received(self, batch: StepBatch, frame: bytes | None) -> Tensor:
        sender = self._spec.stage.index - 1
        if frame is None:
            raise BadFrame(sender, f"step {batch.step} without hidden states")
        try:
            received = Frame.decode(frame)
            self._refuse(batch, received, sender)
            self._check.check_relayed(batch, self._spec.stage.index)
            return tensor_of(received, self._device)
        except FrameError as error:
            raise BadFrame(sender, error.message) from error

    def _refuse_epoch(self, batch: StepBatch) -> None:
        epoch = self._spec.topology.epoch
        if batch.epoch < epoch:
            raise OldEpoch(f"step {batch.step} of epoch {batch.epoch} came when {epoch} runs")
        if batch.epoch > epoch:
            raise FrameError(f"step {batch.step} is of epoch {batch.epoch}, which this stage does not know")
        if batch.versions.common(own_versions()) is None:
            raise FrameError(f"step {batch.step} is of a release of azu that this stage does not understand")

    def _refuse_repeated(self, batch: StepBatch) -> None:
        # Within an epoch steps arrive in order; a step that arrived twice would be sampled twice.
        if batch.step <= self._last_step:
            raise FrameError(f"step {batch.step} came after step {self._last_step}")

    def _refuse(self, batch: StepBatch, frame: Frame, sender: int) -> None:
        if frame.epoch != batch.epoch:
            raise FrameError(f"a frame of epoch {frame.epoch} came with a step of epoch {batch.epoch}")
        self._refuse_repeated(batch)
        if (frame.step, frame.micro_batch, frame.stage) != (batch.step, batch.micro_batch, sender):
            raise FrameError(
                f"step {frame.step}.{frame.micro_batch} of stage {frame.stage} came with step {batch.step}"
            )
        if frame.rows != _rows(batch):
            raise FrameError(f"step {frame.step}: its rows are not those of the batch")
        structure = self._spec.structure
        shape = (batch.num_tokens, structure.hidden_size)
        if frame.shape != shape or frame.dtype != structure.dtype:
            raise FrameError(f"step {frame.step}: {frame.dtype} {list(frame.shape)}, not {list(shape)}")

    def _layout(self, slices: Sequence[Slice]) -> Layout:
        build = self._layouts.packed if self._model.packed else self._layouts.padded
        return build(slices)

    def _frame(self, batch: StepBatch, payload: bytes | memoryview) -> bytes:
        return Frame(
            epoch=batch.epoch,
            step=batch.step,
            micro_batch=batch.micro_batch,
            stage=self._spec.stage.index,
            dtype=self._spec.structure.dtype,
            shape=(batch.num_tokens, self._spec.structure.hidden_size),
            rows=_rows(batch),
            payload=payload,
        ).encode()

    def _distribute(
        self, built: BuiltStage, layer: int, held: HeldExperts | None, link: ExpertLink | None
    ) -> DistributedExperts:
        """Put distributed experts in the place of a layer's experts module."""
        spec, structure = self._spec, self._spec.structure
        assert link is not None, f"the distributed experts of layer {layer} need a link"
        distributed = DistributedLayer(
            layer=layer,
            num_experts=structure.layers[layer].num_experts,
            expert_sets=tuple(one for one in spec.topology.expert_sets if layer in one.experts),
        )
        module = DistributedExperts(distributed, held, link, self._context, spec.expert_timeout_s)
        block = self._model.layers[layer - spec.stage.span.start]
        replace_module(block, built.expert_paths[layer], module)
        return module

    def _step_id(self, batch: StepBatch) -> StepId:
        return StepId(batch.epoch, batch.step, batch.micro_batch, self._spec.stage.index)


class SentLog:
    """The rows of hidden states that a stage sent, by sequence and position, up to `max_bytes`.

    When there are more, the log drops the sequence that began first: its rows are then computed again from
    its tokens. The log has all rows of a sequence from position 0 on, or none.
    """

    def __init__(self, row_bytes: int, max_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._max_bytes = max_bytes
        self._rows: dict[int, bytearray] = {}
        self._num_bytes = 0

    def record(self, slices: Iterable[Slice], payload: memoryview) -> None:
        """Store the rows of a step, in the order of its slices; rows that run again replace the old ones."""
        offset = 0
        for slice_ in slices:
            size = slice_.num_tokens * self._row_bytes
            self._put(slice_.sequence_id, slice_.position * self._row_bytes, payload[offset : offset + size])
            offset += size
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= len(self._rows.pop(next(iter(self._rows))))

    def num_rows(self, sequence_ids: Iterable[int]) -> Mapping[int, int]:
        """Return the number of stored rows of each of these sequences that has any."""
        return {key: len(self._rows[key]) // self._row_bytes for key in sequence_ids if key in self._rows}

    def rows(self, slices: Sequence[Slice]) -> bytes | None:
        """Return the rows of some slices one after another, None unless all of them are stored."""
        parts = []
        for slice_ in slices:
            begin = slice_.position * self._row_bytes
            end = begin + slice_.num_tokens * self._row_bytes
            kept = self._rows.get(slice_.sequence_id, b"")
            if len(kept) < end:
                return None
            parts.append(kept[begin:end])
        return b"".join(parts)

    def drop(self, sequence_ids: Iterable[int]) -> None:
        """Forget sequences that have finished; an unknown id is not an error."""
        for sequence_id in sequence_ids:
            self._num_bytes -= len(self._rows.pop(sequence_id, b""))

    def clear(self) -> None:
        """Forget every sequence."""
        self._rows.clear()
        self._num_bytes = 0

    def _put(self, sequence_id: int, begin: int, rows: memoryview) -> None:
        kept = self._rows.get(sequence_id)
        if kept is None and begin == 0:
            kept = self._rows[sequence_id] = bytearray()
        if kept is None or begin > len(kept):
            return
        before = len(kept)
        kept[begin : begin + len(rows)] = rows
        self._num_bytes += len(kept) - before


@contextmanager
def _not_finite(layers: Iterable[nn.Module]) -> Iterator[list[int]]:
    """List the places of layers that put out values that are not finite while the block runs, in order."""
    places: list[int] = []

    def look(place: int, _module: nn.Module, _args: object, out: Any) -> None:
        if not all_finite(out[0] if isinstance(out, tuple) else out):
            places.append(place)

    hooks = [layer.register_forward_hook(partial(look, place)) for place, layer in enumerate(layers)]
    try:
        yield places
    finally:
        for hook in hooks:
            hook.remove()


def _joined(outs: list[Tensor]) -> Tensor:
    """Return the rows of some outputs one after another; one without rows may have another width."""
    filled = [out for out in outs if len(out)] or outs[:1]
    return filled[0] if len(filled) == 1 else torch.cat(filled)


@dataclass(frozen=True, slots=True)
class _Ran:
    """The outputs of some tokens of a step; at most `num_tokens` of them ran at once.

    The sequences in `lost` had a row in some layer that is not finite, also where no output shows it.
    """

    out: Tensor
    num_tokens: int
    work: tuple[ExpertWork, ...]
    lost: frozenset[int]

    @property
    def is_finite(self) -> bool:
        return not self.lost and all_finite(self.out)

    def of(self, sequence_id: int, out: Tensor) -> "_Ran":
        """Return the part of one sequence, whose outputs are `out`."""
        own = [one for one in self.work if sequence_id in one.choices]
        work = tuple(replace(one, choices={sequence_id: one.choices[sequence_id]}) for one in own)
        return _Ran(out, self.num_tokens, work, self.lost & {sequence_id})


def _rows(batch: StepBatch) -> tuple[FrameRow, ...]:
    return tuple(FrameRow(slice_.sequence_id, slice_.position, slice_.num_tokens) for slice_ in batch.slices)


def _result(batch: StepBatch, tokens: tuple[SampledToken, ...]) -> StepResult:
    return StepResult(
        epoch=batch.epoch,
        step=batch.step,
        micro_batch=batch.micro_batch,
        tokens=tokens,
        faults=batch.faults,
        expert_work=batch.expert_work,
        most_tokens=batch.most_tokens,
    )
