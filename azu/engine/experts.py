"""Experts apart from their routers: how they are held, and how they are asked."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from azu.architecture.config import read_config
from azu.architecture.skeleton import build_from, experts_in, find_layers
from azu.engine.expert_frames import TokenSlices, encode_answer
from azu.engine.shortage import run_in_parts
from azu.engine.tensors import dtype_name, dtype_named
from azu.engine.weights import expert_tensors, load_part
from azu.errors import FrameError, ShardError
from azu.protocol.structure import Structure


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
    model = build_from(read_config(config_folder), dtype=dtype_named(structure.dtype))
    layers = list(model.get_submodule(find_layers(model).path).children())
    for layer, chosen in experts.items():
        found = experts_in(layers[layer])
        if found is None:
            raise ShardError(f"layer {layer} has no experts")
        shrink(found.module, len(chosen))
        tensors = expert_tensors(structure, layer, chosen, shard_paths, as_layer=layer)
        load_part(model, found.module, tensors, device)
        yield layer, HeldExperts(found.module, chosen, structure.layers[layer].num_experts)
