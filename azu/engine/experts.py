"""Experts apart from their routers: how they are held, and how they are asked."""

import struct
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import xxhash
from torch import Tensor, nn

from azu.engine.layout import Layout
from azu.engine.out_of_memory import run_in_parts
from azu.engine.stage_contract import ExpertsFailed, is_bad_frame
from azu.engine.tensors import dtype_name, dtype_named, payload_of, tensor_of
from azu.engine.weights import expert_tensors, load_part
from azu.errors import AzuError, FrameError, ShardError
from azu.models.config_json import read_config
from azu.models.skeleton import build_skeleton, experts_in, find_layers
from azu.protocol.frame import Frame, FrameRow
from azu.protocol.step import ExpertWork
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet

_LENGTH = struct.Struct("<Q")
_NUM_FRAMES = 3


@dataclass(frozen=True, slots=True)
class StepId:
    """Which step, and which stage's, a slice belongs to."""

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


@dataclass(frozen=True, slots=True)
class TokenSlices:
    """What experts need of the tokens routed to them: hidden [T, H], ids [T, k] and weights [T, k]."""

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
        """Check a received request; raises FrameError when its parts are malformed or do not fit together."""
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


def encode_answer(sums: Tensor, request: bytes, step: StepId, layer: int) -> bytes:
    """Return the experts' answer to a request of a layer."""
    return step.frame(sums, _rows(request, layer, len(sums)))


def decode_answer(
    answer: bytes, request: bytes, sent: TokenSlices, layer: int, device: torch.device
) -> Tensor:
    """Check the experts' answer to a request; raises FrameError when it does not belong to it."""
    frame = Frame.decode(answer)
    step = sent.step
    if (frame.epoch, frame.step, frame.micro_batch) != (step.epoch, step.step, step.micro_batch):
        raise FrameError(f"experts answered step {frame.step} when asked for step {step.step}")
    if frame.shape != tuple(sent.hidden.shape) or frame.dtype != dtype_name(sent.hidden.dtype):
        raise FrameError(f"experts answered {frame.dtype} {list(frame.shape)} of another size than they got")
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


class PendingExperts(Protocol):
    """Experts at work elsewhere."""

    def result(self, timeout_s: float) -> bytes:
        """Wait for the answer; raises an AzuError when there is none in time."""


class ExpertLink(Protocol):
    """The way from a router to the expert sets."""

    def start(self, expert_set: int, layer: int, request: bytes) -> PendingExperts:
        """Send token slices to an expert set without waiting."""


class HeldExperts:
    """Some experts of one layer in memory; `experts` are their ids, in the module's order."""

    def __init__(self, module: nn.Module, experts: tuple[int, ...], num_experts: int) -> None:
        self.module = module
        self.experts = experts
        places = torch.full((num_experts + 1,), len(experts), dtype=torch.long)
        places[list(experts)] = torch.arange(len(experts))
        self._places = places

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum [T, H] of these experts; every other id, -1 included, adds nothing."""
        if self._places.device != ids.device:
            self._places = self._places.to(ids.device)
        # The library's own convention for an expert that lives elsewhere: the id behind the last, weight 0.
        places = self._places[ids]
        elsewhere = places == len(self.experts)
        out: Tensor = self.module(hidden, places, weights.masked_fill(elsewhere, 0))
        return out


class ExpertRunner:
    """Holds experts of some layers on one node and runs token slices through them, without state."""

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
        self._held = dict(_hold(structure, experts, shard_paths, config_folder, self._device))

    @torch.inference_mode()
    def run(self, layer: int, request: bytes) -> bytes:
        """Run a request's token slices through the experts of a layer.

        Raises FrameError for a malformed request or one that asks for what is not held here.
        """
        if layer not in self._held:
            raise FrameError(f"no expert of layer {layer} is held here")
        held, slices = self._held[layer], TokenSlices.decode(request, self._device)
        self._refuse(slices, held)

        def run(rows: range) -> Tensor:
            part = slice(rows.start, rows.stop)
            return held(slices.hidden[part], slices.ids[part], slices.weights[part])

        parts = run_in_parts(run, range(len(slices.ids)), _halved, self._device.type)
        sums = parts[0] if len(parts) == 1 else torch.cat(parts)
        return encode_answer(sums, request, slices.step, layer)

    def _refuse(self, slices: TokenSlices, held: HeldExperts) -> None:
        structure = self._structure
        if (
            slices.hidden.shape[1] != structure.hidden_size
            or dtype_name(slices.hidden.dtype) != structure.dtype
        ):
            raise FrameError(f"stage {slices.step.stage} sent hidden states that are not this model's")
        asked = set(slices.ids.flatten().tolist()) - {-1}
        if not asked <= set(held.experts):
            raise FrameError(f"stage {slices.step.stage} asked for experts that are not held here")


def _halved(rows: range) -> tuple[range, range] | None:
    half = len(rows) // 2
    return (rows[:half], rows[half:]) if half else None


def shrink(module: nn.Module, num_experts: int) -> None:
    """Make an experts module on the meta device one of `num_experts`, which skips every id behind them."""
    whole = module.num_experts
    for name, parameter in list(module.named_parameters(recurse=False)):
        assert parameter.shape[0] == whole, (name, parameter.shape)
        empty = torch.empty((num_experts, *parameter.shape[1:]), dtype=parameter.dtype, device="meta")
        setattr(module, name, nn.Parameter(empty, requires_grad=False))
    module.num_experts = num_experts  # type: ignore[assignment] # an int that transformers gave the module
    module._is_expert_parallel = True  # type: ignore[assignment]


def _hold(
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
        shrink(found.module, len(chosen))
        tensors = expert_tensors(structure, layer, chosen, shard_paths, as_layer=layer)
        load_part(model, found.module, tensors, device)
        yield layer, HeldExperts(found.module, chosen, structure.layers[layer].num_experts)


class StepContext:
    """The step under way on one stage."""

    def __init__(self) -> None:
        self._step: StepId | None = None
        self._layout: Layout | None = None
        self._owners = torch.empty(0, dtype=torch.long)
        self._work: list[ExpertWork] = []

    def begin(self, step: StepId, layout: Layout) -> None:
        """Start a step."""
        self._step, self._layout, self._work = step, layout, []
        counts = torch.tensor([piece.num_tokens for piece in layout.slices])
        self._owners = torch.repeat_interleave(torch.arange(len(counts)), counts)

    @property
    def step(self) -> StepId:
        """Which step it is."""
        assert self._step is not None, "begin() comes first"
        return self._step

    @property
    def layout(self) -> Layout:
        """How its slices lie in the forward."""
        assert self._layout is not None, "begin() comes first"
        return self._layout

    @property
    def work(self) -> tuple[ExpertWork, ...]:
        """What was activated in the layers whose experts are spread."""
        return tuple(self._work)

    def add_work(self, layer: int, node_id: str, activated_bytes: Tensor) -> None:
        """Count parameter bytes [tokens] that a node activated for each token row in a layer."""
        slices = self.layout.slices
        totals = torch.zeros(len(slices), dtype=torch.long)
        totals.index_add_(0, self._owners, activated_bytes.cpu())
        self._work += [
            ExpertWork(piece.sequence_id, layer, node_id, total)
            for piece, total in zip(slices, totals.tolist(), strict=True)
            if total
        ]


_HERE = -1
_NOBODY = -2


@dataclass(frozen=True, slots=True)
class SpreadLayer:
    """A MoE layer whose experts are not all beside their router.

    `router_bytes` counts what one token activates beside the experts, `expert_bytes` one expert's parameters.
    """

    layer: int
    num_experts: int
    node_id: str
    router_bytes: int
    expert_bytes: int
    expert_sets: tuple[ExpertSet, ...]


@dataclass(frozen=True, slots=True)
class _Asked:
    """Token slices on their way to an expert set: `theirs` [T, k] are its choices, `rows` their tokens."""

    expert_set: ExpertSet
    theirs: Tensor
    rows: Tensor
    sent: TokenSlices
    request: bytes
    pending: PendingExperts


class SpreadExperts(nn.Module):
    """Fans routed tokens out to expert sets, runs the local experts meanwhile, merges in a fixed order.

    Takes and gives what an experts module does: hidden [T, H], ids [T, k], weights [T, k] -> [T, H].
    """

    def __init__(
        self,
        spread: SpreadLayer,
        held: HeldExperts | None,
        link: ExpertLink,
        context: StepContext,
        timeout_s: float,
    ) -> None:
        super().__init__()
        self._spread = spread
        self._held = held
        self._module = held.module if held is not None else None
        self._link = link
        self._context = context
        self._timeout_s = timeout_s
        self._holders = _holders(spread, held)
        self._num_chosen = [0] * spread.num_experts

    @property
    def layer(self) -> int:
        """Which layer's experts these are."""
        return self._spread.layer

    @property
    def num_chosen(self) -> tuple[int, ...]:
        """How often each expert was chosen since this stage came up."""
        return tuple(self._num_chosen)

    def relink(self, expert_sets: Iterable[ExpertSet], link: ExpertLink) -> None:
        """Learn where the experts are now; those beside the router stay."""
        layer = self._spread.layer
        chosen = tuple(one for one in expert_sets if layer in one.experts)
        self._spread, self._link = replace(self._spread, expert_sets=chosen), link
        self._holders = _holders(self._spread, self._held)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum [T, H] of every token's experts."""
        padding = self._context.layout.padding
        if padding is None:
            return self._merged(hidden, ids, weights)
        # Only tokens travel and are paid for, not the padding between them.
        rows = padding.flatten().nonzero()[:, 0]
        out = torch.zeros_like(hidden)
        out[rows] = self._merged(hidden[rows], ids[rows], weights[rows])
        return out

    def _merged(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = _counts(ids, self._spread.num_experts)
        self._num_chosen = [before + count for before, count in zip(self._num_chosen, counts, strict=True)]
        owners = self._owners(ids, counts)
        # Every call of the layer is on its way before anything here waits or computes.
        asked = deque(self._ask(owners, hidden, ids, weights))
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        if self._held is not None:
            out += self._held(hidden, ids.masked_fill(owners != _HERE, -1), weights)
        self._count(self._spread.node_id, (owners == _HERE).sum(1), router=True)
        while asked:
            one = asked.popleft()
            try:
                answer = self._answer(one, hidden.device)
            except ExpertsFailed as error:
                theirs = ids.masked_fill(~one.theirs, -1)
                self._do_without(one.expert_set, theirs, error)
                counts = _counts(theirs, self._spread.num_experts)
                asked += self._ask(self._owners(theirs, counts), hidden, theirs, weights)
                continue
            self._count(one.expert_set.node_id, one.theirs.sum(1), router=False)
            out.index_add_(0, one.rows, answer.float())
        return out.to(hidden.dtype)

    def _ask(self, owners: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor) -> list[_Asked]:
        """Send every expert set what it serves of some choices."""
        asked = []
        for chosen in self._spread.expert_sets:
            theirs = owners == chosen.index
            rows = theirs.any(1).nonzero()[:, 0]
            if not len(rows):
                continue
            sent = TokenSlices(
                self._context.step,
                hidden[rows],
                ids.masked_fill(~theirs, -1)[rows],
                weights.masked_fill(~theirs, 0)[rows],
            )
            request = sent.encode()
            pending = self._link.start(chosen.index, self._spread.layer, request)
            asked.append(_Asked(chosen, theirs, rows, sent, request, pending))
        return asked

    def _answer(self, asked: _Asked, device: torch.device) -> Tensor:
        try:
            answer = asked.pending.result(self._timeout_s)
            return decode_answer(answer, asked.request, asked.sent, self._spread.layer, device)
        except AzuError as error:
            raise ExpertsFailed(asked.expert_set.index, error.message) from error

    def _do_without(self, chosen: ExpertSet, ids: Tensor, error: ExpertsFailed) -> None:
        """Have replicas serve instead of a set that is gone, until the next topology.

        Raises the error without them, and for a bad answer: whoever sent it is to be put away first.
        """
        holders = {
            # Whoever is the only one is asked again, and is to blame then.
            expert: tuple(one for one in them if one != chosen.index) or them
            for expert, them in self._holders.items()
        }
        asked = set(ids.flatten().tolist()) - {-1}
        if is_bad_frame(error) or any(chosen.index in holders[expert] for expert in asked):
            raise error
        self._holders = holders

    def _owners(self, ids: Tensor, counts: Collection[int]) -> Tensor:
        """Return who serves each choice [T, k]: an expert set's index, _HERE or _NOBODY (of an id of -1).

        Replicas share by load.
        """
        load = dict.fromkeys((chosen.index for chosen in self._spread.expert_sets), 0)
        owner = []
        for expert, count in enumerate(counts):
            if not count:
                owner.append(_NOBODY)
                continue
            owner.append(min(self._holders[expert], key=lambda index: (load.get(index, -1), index)))
            if owner[-1] != _HERE:
                load[owner[-1]] += count
        return torch.tensor([*owner, _NOBODY], device=ids.device)[ids]

    def _count(self, node_id: str, choices: Tensor, *, router: bool) -> None:
        extra = self._spread.router_bytes if router else 0
        self._context.add_work(self._spread.layer, node_id, choices * self._spread.expert_bytes + extra)


def _counts(ids: Tensor, num_experts: int) -> Collection[int]:
    """Return how often each expert is chosen; -1 is no choice."""
    counts: list[int] = torch.bincount(ids.flatten() + 1, minlength=num_experts + 1).tolist()
    return counts[1:]


def _holders(spread: SpreadLayer, held: HeldExperts | None) -> Mapping[int, tuple[int, ...]]:
    local = held.experts if held is not None else ()
    holders: dict[int, tuple[int, ...]] = dict.fromkeys(local, (_HERE,))
    for expert in set(range(spread.num_experts)) - set(local):
        holders[expert] = tuple(
            chosen.index for chosen in spread.expert_sets if expert in chosen.experts.get(spread.layer, ())
        )
        if not holders[expert]:
            raise FrameError(f"expert {expert} of layer {spread.layer} is in no expert set")
    return holders
