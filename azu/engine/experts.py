"""Experts on other nodes than their router.

On the router's stage `DistributedExperts` takes the place of a layer's experts: it sends token slices to the
expert sets, runs the local experts meanwhile and merges the answers. `ExpertRunner` is an expert set: it
holds experts of some layers and runs the token slices that arrive. Both exchange frames; an answer carries
the request's checksum.
"""

import struct
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

import torch
import xxhash
from torch import Tensor, nn

from azu.engine.expert_counts import ReceivedChoices
from azu.engine.layout import Layout
from azu.engine.out_of_memory import run_in_parts
from azu.engine.stage_contract import ExpertsFailed, RowsNotFinite, is_bad_frame
from azu.engine.tensors import all_finite, dtype_name, dtype_named, payload_of, tensor_of
from azu.engine.weights import expert_tensors, load_part
from azu.errors import AzuError, FrameError, ShardError
from azu.models.compat import set_num_experts
from azu.models.config_json import read_config
from azu.models.skeleton import build_skeleton, experts_in, find_layers
from azu.protocol.frame import Frame, FrameRow
from azu.protocol.step import ExpertWork
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet

_LENGTH = struct.Struct("<Q")
_NUM_FRAMES = 3
# In place of an expert set's index: the experts beside the router, and no expert at all (of the id -1).
_LOCAL = -1
_NONE = -2


class PendingExperts(Protocol):
    """A request to an expert set that has not been answered yet."""

    def result(self, timeout_s: float) -> bytes:
        """Wait for the answer and return it; raises an AzuError when there is none in time."""


class ExpertLink(Protocol):
    """The connection from a router to the expert sets of its topology, by their indices."""

    def start(self, expert_set: int, layer: int, request: bytes) -> PendingExperts:
        """Send a request to an expert set and return without waiting."""


@dataclass(frozen=True, slots=True)
class StepId:
    """A step at one stage: what a frame's header says of it."""

    epoch: int
    step: int
    micro_batch: int
    stage: int

    def frame(self, tensor: Tensor, rows: tuple[FrameRow, ...] = ()) -> bytes:
        """Return a tensor as a frame of this step."""
        return Frame(
            epoch=self.epoch,
            step=self.step,
            micro_batch=self.micro_batch,
            stage=self.stage,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            rows=rows,
            payload=payload_of(tensor),
        ).encode()


class StepContext:
    """The current step of one stage, shared by its layers with distributed experts."""

    def __init__(self) -> None:
        self._step: StepId | None = None
        self._layout: Layout | None = None
        self._owners = torch.empty(0, dtype=torch.long)
        self._work: list[ExpertWork] = []
        self.lost: frozenset[int] = frozenset()  # sequences with rows that are not finite
        self.not_finite: dict[int, str] = {}  # layer -> the node whose experts left finite numbers

    def begin(self, step: StepId, layout: Layout) -> None:
        """Start a step."""
        self._step, self._layout, self._work, self.lost = step, layout, [], frozenset()
        self.not_finite.clear()
        counts = torch.tensor([slice_.num_tokens for slice_ in layout.slices])
        self._owners = torch.repeat_interleave(torch.arange(len(counts)), counts)

    @property
    def step(self) -> StepId:
        """The step's identity."""
        assert self._step is not None, "begin() comes first"
        return self._step

    @property
    def layout(self) -> Layout:
        """The positions of the step's slices in the forward."""
        assert self._layout is not None, "begin() comes first"
        return self._layout

    @property
    def work(self) -> tuple[ExpertWork, ...]:
        """What each holder ran in the layers whose experts are distributed."""
        return tuple(self._work)

    def lose(self, rows: Tensor) -> None:
        """Note that these token rows are not finite."""
        slices = self.layout.slices
        self.lost |= {slices[index].sequence_id for index in self._owners[rows.cpu()].tolist()}

    def add_work(self, layer: int, expert_set: int | None, choices: Tensor) -> None:
        """Count the choices [tokens] of each token row that a holder of experts served in a layer."""
        slices = self.layout.slices
        totals = torch.zeros(len(slices), dtype=torch.long)
        totals.index_add_(0, self._owners, choices.cpu())
        counted = zip(slices, totals.tolist(), strict=True)
        if served := {slice_.sequence_id: total for slice_, total in counted if total}:
            self._work.append(ExpertWork(layer, expert_set, served))


class HeldExperts:
    """Some experts of one layer in memory; `experts` are their ids in the module's order."""

    def __init__(self, module: nn.Module, experts: tuple[int, ...], num_experts: int) -> None:
        self.module = module
        self.experts = experts
        places = torch.full((num_experts + 1,), len(experts), dtype=torch.long)
        places[list(experts)] = torch.arange(len(experts))
        self._places = places

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum [T, H] of these experts; all other ids, -1 too, add nothing."""
        if self._places.device != ids.device:
            self._places = self._places.to(ids.device)
        # transformers' own convention for an expert that is elsewhere: the id behind the last one, weight 0.
        places = self._places[ids]
        elsewhere = places == len(self.experts)
        out: Tensor = self.module(hidden, places, weights.masked_fill(elsewhere, 0))
        return out


def shrink_experts(module: nn.Module, num_experts: int) -> None:
    """Leave room for `num_experts` experts in an experts module on the meta device."""
    whole = module.num_experts
    for name, parameter in list(module.named_parameters(recurse=False)):
        assert parameter.shape[0] == whole, (name, parameter.shape)
        empty = torch.empty((num_experts, *parameter.shape[1:]), dtype=parameter.dtype, device="meta")
        setattr(module, name, nn.Parameter(empty, requires_grad=False))
    set_num_experts(module, num_experts)


@dataclass(frozen=True, slots=True)
class DistributedLayer:
    """A MoE layer whose experts are not all beside their router."""

    layer: int
    num_experts: int
    expert_sets: tuple[ExpertSet, ...]


@dataclass(frozen=True, slots=True)
class TokenSlices:
    """A request to experts: tokens' hidden states [T, H], expert ids [T, k] (-1 for none), weights [T, k]."""

    step: StepId
    hidden: Tensor
    ids: Tensor
    weights: Tensor

    def encode(self) -> bytes:
        """Return the request's bytes."""
        frames = [self.step.frame(tensor) for tensor in (self.hidden, self.ids.to(torch.int32), self.weights)]
        return b"".join(_LENGTH.pack(len(frame)) + frame for frame in frames)

    @classmethod
    def decode(cls, request: bytes, device: torch.device) -> "TokenSlices":
        """Check and return a received request; raises FrameError when its parts are malformed or differ."""
        frames = [Frame.decode(part) for part in _split(request)]
        hidden, ids, weights = (tensor_of(frame, device) for frame in frames)
        if hidden.dim() != 2 or ids.shape != weights.shape or ids.dim() != 2 or len(ids) != len(hidden):
            raise FrameError("an expert request's hidden states, ids and weights do not fit together")
        if ids.dtype is not torch.int32:
            raise FrameError(f"an expert request's ids are {ids.dtype}")
        steps = {StepId(one.epoch, one.step, one.micro_batch, one.stage) for one in frames}
        if len(steps) != 1:
            raise FrameError("an expert request's parts are of different steps")
        return cls(steps.pop(), hidden, ids.long(), weights)


@dataclass(frozen=True, slots=True)
class _SentRequest:
    """A request to an expert set: `choices` [T, k] marks what the set serves, `rows` are the tokens sent."""

    expert_set: ExpertSet
    choices: Tensor
    rows: Tensor
    slices: TokenSlices
    content: bytes
    pending: PendingExperts


class DistributedExperts(nn.Module):
    """A layer's experts on several nodes; their answers are merged in a fixed order.

    It has the interface of an experts module: hidden [T, H], ids [T, k], weights [T, k] -> [T, H].
    """

    def __init__(
        self,
        distributed: DistributedLayer,
        held: HeldExperts | None,
        link: ExpertLink,
        context: StepContext,
        timeout_s: float,
    ) -> None:
        super().__init__()
        self._distributed = distributed
        self._held = held
        self._module = held.module if held is not None else None
        self._link = link
        self._context = context
        self._timeout_s = timeout_s
        self._holders = _holders(distributed, held)
        self._num_chosen = [0] * distributed.num_experts

    @property
    def layer(self) -> int:
        """The layer's number in the model."""
        return self._distributed.layer

    @property
    def num_chosen(self) -> tuple[int, ...]:
        """How often each expert was chosen since the stage started."""
        return tuple(self._num_chosen)

    def relink(self, expert_sets: Iterable[ExpertSet], link: ExpertLink) -> None:
        """Use other expert sets from now on; the experts beside the router stay."""
        own = tuple(expert_set for expert_set in expert_sets if self.layer in expert_set.experts)
        self._distributed, self._link = replace(self._distributed, expert_sets=own), link
        self._holders = _holders(self._distributed, self._held)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum [T, H] of every token's experts; NaN for a token without a finite one."""
        padding = self._context.layout.padding
        if padding is None:
            return self._merged(hidden, ids, weights)
        # Only tokens are sent and paid for, not the padding between them.
        rows = padding.flatten().nonzero()[:, 0]
        out = torch.zeros_like(hidden)
        out[rows] = self._merged(hidden[rows], ids[rows], weights[rows])
        return out

    def _merged(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if not all_finite(hidden) or not all_finite(weights):
            # No expert gets such a token.
            is_lost = ~(hidden.isfinite().all(-1, True) & weights.isfinite().all(-1, True))
            self._context.lose(is_lost[:, 0].nonzero()[:, 0])
            zeros = (
                hidden.masked_fill(is_lost, 0),
                ids.masked_fill(is_lost, -1),
                weights.masked_fill(is_lost, 0),
            )
            return self._merged(*zeros).masked_fill(is_lost, torch.nan)
        counts = _counts(ids, self._distributed.num_experts)
        self._num_chosen = [before + count for before, count in zip(self._num_chosen, counts, strict=True)]
        servers = self._servers(ids, counts)
        # All requests of the layer leave before this stage waits or computes.
        sent = deque(self._send(servers, hidden, ids, weights))
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        if self._held is not None:
            out += self._held(hidden, ids.masked_fill(servers != _LOCAL, -1), weights)
        self._context.add_work(self.layer, None, (servers == _LOCAL).sum(1))
        while sent:
            request = sent.popleft()
            try:
                answer = self._answer(request, hidden.device)
            except (ExpertsFailed, RowsNotFinite) as error:
                missing = ids.masked_fill(~request.choices, -1)
                if isinstance(error, RowsNotFinite):
                    rows = request.rows[list(error.rows)]
                    out[rows] = torch.nan
                    self._context.lose(rows)
                    self._compare(request, hidden[rows], missing[rows], weights[rows])
                    missing[rows] = -1
                else:
                    self._switch_to_replicas(request.expert_set, missing, error)
                counts = _counts(missing, self._distributed.num_experts)
                sent += self._send(self._servers(missing, counts), hidden, missing, weights)
                continue
            self._context.add_work(self.layer, request.expert_set.index, request.choices.sum(1))
            out.index_add_(0, request.rows, answer.float())
        return out.to(hidden.dtype)

    def _send(self, servers: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor) -> list[_SentRequest]:
        """Send a request to every expert set that serves some of the choices."""
        sent = []
        for expert_set in self._distributed.expert_sets:
            choices = servers == expert_set.index
            rows = choices.any(1).nonzero()[:, 0]
            if not len(rows):
                continue
            slices = TokenSlices(
                self._context.step,
                hidden[rows],
                ids.masked_fill(~choices, -1)[rows],
                weights.masked_fill(~choices, 0)[rows],
            )
            content = slices.encode()
            pending = self._link.start(expert_set.index, self.layer, content)
            sent.append(_SentRequest(expert_set, choices, rows, slices, content, pending))
        return sent

    def _answer(self, request: _SentRequest, device: torch.device) -> Tensor:
        try:
            answer = request.pending.result(self._timeout_s)
            return decode_answer(answer, request.content, request.slices, self.layer, device)
        except RowsNotFinite as error:
            if _are_rows(error.rows, len(request.rows)):
                raise
            raise ExpertsFailed(request.expert_set.index, "it named rows that it was not sent") from error
        except AzuError as error:
            raise ExpertsFailed(request.expert_set.index, error.message) from error
        except Exception as error:
            fault = FrameError(f"its answer cannot be read ({type(error).__name__})")
            raise ExpertsFailed(request.expert_set.index, fault.message) from fault

    def _compare(self, request: _SentRequest, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Have other holders compute rows for which an expert set has no finite values.

        Raises ExpertsFailed where their values are finite: the set is to blame. Elsewhere the rows are.
        """
        failed, holders = request.expert_set, self._holders
        self._context.not_finite[self.layer] = failed.node_id
        others = {
            expert: tuple(index for index in indices if index != failed.index)
            for expert, indices in holders.items()
        }
        asked = set(ids.flatten().tolist()) - {-1}
        if not all(others[expert] for expert in asked):
            return
        self._holders = others
        try:
            servers = self._servers(ids, _counts(ids, self._distributed.num_experts))
            for other in self._send(servers, hidden, ids, weights):
                self._answer(other, hidden.device)
            if self._held is not None:
                own = self._held(hidden, ids.masked_fill(servers != _LOCAL, -1), weights)
                if not all_finite(own):
                    return
        except (RowsNotFinite, ExpertsFailed):
            return
        finally:
            self._holders = holders
        fault = FrameError("its values are not finite, and those of the same experts elsewhere are")
        raise ExpertsFailed(failed.index, fault.message) from fault

    def _switch_to_replicas(self, failed: ExpertSet, ids: Tensor, error: ExpertsFailed) -> None:
        """Use replicas in place of a set that is gone, until the next topology.

        Raises the error when some expert has no replica, and for a bad answer: its sender has to be removed.
        """
        holders = {
            # The only holder of an expert stays in place: when it is asked again and fails, it is to blame.
            expert: tuple(index for index in indices if index != failed.index) or indices
            for expert, indices in self._holders.items()
        }
        asked = set(ids.flatten().tolist()) - {-1}
        if is_bad_frame(error) or any(failed.index in holders[expert] for expert in asked):
            raise error
        self._holders = holders

    def _servers(self, ids: Tensor, counts: Collection[int]) -> Tensor:
        """Return the expert set of each choice [T, k], or _LOCAL or _NONE; replicas share the load."""
        load = dict.fromkeys((expert_set.index for expert_set in self._distributed.expert_sets), 0)
        servers = []
        for expert, count in enumerate(counts):
            if not count:
                servers.append(_NONE)
                continue
            servers.append(min(self._holders[expert], key=lambda index: (load.get(index, -1), index)))
            if servers[-1] != _LOCAL:
                load[servers[-1]] += count
        return torch.tensor([*servers, _NONE], device=ids.device)[ids]


def _are_rows(rows: object, num_rows: int) -> bool:
    """Say whether an expert set named rows of a request that has `num_rows`."""
    are_whole = type(rows) is tuple and rows != () and all(type(row) is int for row in rows)
    return are_whole and set(cast(tuple[int, ...], rows)) <= set(range(num_rows))


def _counts(ids: Tensor, num_experts: int) -> Collection[int]:
    """Return how often each expert is chosen; -1 counts for none."""
    counts: list[int] = torch.bincount(ids.flatten() + 1, minlength=num_experts + 1).tolist()
    return counts[1:]


def _holders(distributed: DistributedLayer, held: HeldExperts | None) -> Mapping[int, tuple[int, ...]]:
    """Return expert -> the expert sets that hold it, or _LOCAL; raises FrameError for one that none holds."""
    layer = distributed.layer
    local = held.experts if held is not None else ()
    holders: dict[int, tuple[int, ...]] = dict.fromkeys(local, (_LOCAL,))
    for expert in set(range(distributed.num_experts)) - set(local):
        holders[expert] = tuple(
            expert_set.index
            for expert_set in distributed.expert_sets
            if expert in expert_set.experts.get(layer, ())
        )
        if not holders[expert]:
            raise FrameError(f"expert {expert} of layer {layer} is in no expert set")
    return holders


class ExpertRunner:
    """An expert set: holds experts of some layers and runs token slices through them, without other state."""

    def __init__(
        self,
        structure: Structure,
        experts: Mapping[int, tuple[int, ...]],
        shard_paths: Mapping[str, Path],
        config_folder: Path,
        device: str,
    ) -> None:
        self._structure = structure
        self._device = torch.device(device)
        self._held = dict(_load_experts(structure, experts, shard_paths, config_folder, self._device))
        self.received = ReceivedChoices()

    @torch.inference_mode()
    def run(self, layer: int, request: bytes) -> bytes:
        """Run a request's token slices through the experts of a layer.

        Raises FrameError for a malformed request, and for one of experts that are not held here, and
        RowsNotFinite for rows whose sum is not finite.
        """
        if layer not in self._held:
            raise FrameError(f"no expert of layer {layer} is held here")
        held, slices = self._held[layer], TokenSlices.decode(request, self._device)
        num_choices = self._num_choices(slices, held)

        def run(rows: range) -> Tensor:
            part = slice(rows.start, rows.stop)
            return held(slices.hidden[part], slices.ids[part], slices.weights[part])

        parts = run_in_parts(run, range(len(slices.ids)), _halved, self._device.type)
        sums = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not all_finite(sums):
            raise RowsNotFinite(tuple((~sums.isfinite().all(-1)).nonzero()[:, 0].tolist()))
        self.received.add(slices.step.epoch, slices.step.step, layer, num_choices)
        return encode_answer(sums, request, slices.step, layer)

    def _num_choices(self, slices: TokenSlices, held: HeldExperts) -> int:
        """Return how many choices a request has; raises FrameError for one that is not for these experts."""
        structure = self._structure
        if (
            slices.hidden.shape[1] != structure.hidden_size
            or dtype_name(slices.hidden.dtype) != structure.dtype
        ):
            raise FrameError(f"stage {slices.step.stage} sent hidden states that are not this model's")
        chosen = [expert for expert in slices.ids.flatten().tolist() if expert != -1]
        if not set(chosen) <= set(held.experts):
            raise FrameError(f"stage {slices.step.stage} asked for experts that are not held here")
        return len(chosen)


def _halved(rows: range) -> tuple[range, range] | None:
    half = len(rows) // 2
    return (rows[:half], rows[half:]) if half else None


def _load_experts(
    structure: Structure,
    experts: Mapping[int, tuple[int, ...]],
    shard_paths: Mapping[str, Path],
    config_folder: Path,
    device: torch.device,
) -> Iterator[tuple[int, HeldExperts]]:
    model = build_skeleton(read_config(config_folder), dtype=dtype_named(structure.dtype))
    layers = list(model.get_submodule(find_layers(model).path).children())
    for layer, chosen in experts.items():
        found = experts_in(layers[layer])
        if found is None:
            raise ShardError(f"layer {layer} has no experts")
        shrink_experts(found.module, len(chosen))
        tensors = expert_tensors(structure, layer, chosen, shard_paths, as_layer=layer)
        load_part(model, found.module, tensors, device)
        yield layer, HeldExperts(found.module, chosen, structure.layers[layer].num_experts)


def encode_answer(sums: Tensor, request: bytes, step: StepId, layer: int) -> bytes:
    """Return the frame with the weighted sums [T, H] that answer a request of a layer."""
    return step.frame(sums, _rows(request, layer, len(sums)))


def decode_answer(
    answer: bytes, request: bytes, sent: TokenSlices, layer: int, device: torch.device
) -> Tensor:
    """Check an answer and return its sums [T, H]; raises FrameError for one of another request."""
    frame = Frame.decode(answer)
    step = sent.step
    if (frame.epoch, frame.step, frame.micro_batch) != (step.epoch, step.step, step.micro_batch):
        raise FrameError(f"experts answered step {frame.step} when asked for step {step.step}")
    if frame.shape != tuple(sent.hidden.shape) or frame.dtype != dtype_name(sent.hidden.dtype):
        raise FrameError(
            f"experts answered {frame.dtype} {list(frame.shape)}, another size than they received"
        )
    if frame.rows != _rows(request, layer, len(sent.hidden)):
        raise FrameError(f"experts answered another request of step {frame.step}")
    return tensor_of(frame, device)


def _rows(request: bytes, layer: int, num_tokens: int) -> tuple[FrameRow, ...]:
    return (FrameRow(xxhash.xxh3_64_intdigest(request), layer, num_tokens),)


def _split(request: bytes) -> list[bytes]:
    parts, offset = [], 0
    while offset < len(request):
        if len(request) - offset < _LENGTH.size:
            raise FrameError("an expert request is truncated")
        (length,) = _LENGTH.unpack_from(request, offset)
        offset += _LENGTH.size
        parts.append(request[offset : offset + length])
        offset += length
    if len(parts) != _NUM_FRAMES or offset != len(request):
        raise FrameError(f"an expert request has {len(parts)} frames or is truncated")
    return parts
