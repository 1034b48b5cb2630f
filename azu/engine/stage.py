"""One stage: any causal language model of transformers, cut to a span of its layers and run there.

One builder serves every architecture: it takes the whole model on the meta device, removes what the span does
not have, and loads the rest from shards. No code here is written for a family.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from azu.engine.attention import CURRENT_LAYOUT, PACKED
from azu.engine.experts import HeldExperts, shrink_experts
from azu.engine.kv import PagedKV
from azu.engine.layout import Layout, LayoutBuilder
from azu.engine.tensors import dtype_named
from azu.engine.weights import PackedLinear, can_pack, load, pack, stage_tensors
from azu.errors import UnsupportedModel
from azu.models.compat import mark_initialized, takes_registered_attention, takes_sdpa
from azu.models.config_json import read_config
from azu.models.description import Architecture
from azu.models.inspection import describe
from azu.models.skeleton import Experts, build_skeleton, experts_in, replace_module, silence_padding_warnings
from azu.models.trace import trace
from azu.protocol.step import Slice
from azu.protocol.structure import LayerKind, Structure
from azu.protocol.topology import LayerSpan

# The names that families give a layer's number, by which it finds its place in the KV cache.
_INDEX_NAMES = ("layer_idx", "layer_id")
# Tokens of the forward on the meta device that tries packed batches.
_TRIED_TOKENS = 5


@dataclass(frozen=True, slots=True)
class BuiltStage:
    """A stage with its weights.

    `distributed` maps each layer whose experts are not all here to those that are, and `expert_paths` the
    same layers to the paths of their experts modules.
    """

    model: "StageModel"
    distributed: Mapping[int, HeldExperts | None]
    expert_paths: Mapping[int, str]


def build_stage(
    structure: Structure,
    span: LayerSpan,
    experts: Mapping[int, tuple[int, ...]],
    shard_paths: Mapping[str, Path],
    config_folder: Path,
    device: torch.device,
) -> BuiltStage:
    """Build layers [start, end) of a model from its shards; `experts[layer]` are those beside its router.

    Raises UnsupportedModel when the family cannot be cut, ShardError when the shards are not the model's.
    """
    architecture = describe(config_folder)
    model, packed = _skeleton(read_config(config_folder), architecture, dtype_named(structure.dtype))
    cut = CutSkeleton(model, architecture, span, tied_head=structure.tied_head)
    held = {
        layer: tuple(sorted(experts.get(layer, ())))
        for layer in range(span.start, span.end)
        if structure.layers[layer].kind is LayerKind.MOE
    }
    distributed = {
        layer: ids for layer, ids in held.items() if len(ids) < structure.layers[layer].num_experts
    }
    found = {layer: cut.shrink_experts(layer, len(ids)) for layer, ids in distributed.items()}
    cut.mark_modules_without_children()
    load(model, stage_tensors(structure, span, held, shard_paths), device)
    cut.drop_borrowed_embedding()
    if can_pack(device, model.dtype):
        pack(model)
    if architecture.restart_length is not None:
        place_by_sequence_length(model)
    return BuiltStage(
        model=StageModel(
            model,
            cut.decoder,
            cut.layers,
            embedding_width=None if span.start == 0 else cut.embedding_width,
            packed=packed,
        ),
        distributed={
            layer: HeldExperts(found[layer].module, ids, structure.layers[layer].num_experts) if ids else None
            for layer, ids in distributed.items()
        },
        expert_paths={layer: experts.path for layer, experts in found.items()},
    )


def _skeleton(
    config: PreTrainedConfig, architecture: Architecture, dtype: torch.dtype
) -> tuple[PreTrainedModel, bool]:
    """Return the whole model on the meta device with its fastest attention; say if that is packed."""
    packed = takes_packed_batches(config, architecture)
    model = build_skeleton(config, dtype=dtype, attention=PACKED if packed else "eager")
    if not packed and takes_sdpa(model):
        # The model is built again: some families choose the class of their attention when they are built.
        model = build_skeleton(config, dtype=dtype, attention="sdpa")
    silence_padding_warnings(model)
    for path in architecture.unused:
        replace_module(model, path, nn.Identity())
    return model, packed


def takes_packed_batches(config: PreTrainedConfig, architecture: Architecture) -> bool:
    """Say whether a family's forward runs with azu's attention and at the positions that azu gives.

    It does when every layer asks transformers' interface for attention, passes masks on unchanged, and takes
    the positions of its tokens.
    """
    model = build_skeleton(config)
    decoder = model.get_submodule(architecture.layers_path.rpartition(".")[0])
    if not takes_registered_attention(model) or "position_ids" not in signature(decoder.forward).parameters:
        return False
    # Only now: a family without the interface may fail to build with an attention that it does not know.
    model = build_skeleton(config, attention=PACKED)
    meta = torch.device("meta")
    layout = LayoutBuilder(1, _TRIED_TOKENS, meta).packed([Slice(0, 0, _TRIED_TOKENS, (0,), sample=False)])
    token = CURRENT_LAYOUT.set(layout)
    try:
        trace(model)
    except UnsupportedModel:
        return False
    finally:
        CURRENT_LAYOUT.reset(token)
    return True


class StageModel:
    """A model cut to a span of its layers, with its weights. It runs one forward at a time.

    Hidden states enter and leave at the layers themselves. What a family does before and after its layers
    (scales, learned positions, norms) therefore happens once, on the first or the last stage.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: nn.Module,
        layers: nn.ModuleList,
        *,
        embedding_width: int | None,
        packed: bool,
    ) -> None:
        """`embedding_width` is None on the first stage, which embeds; `packed` says which layouts fit."""
        self.packed = packed
        self.layers = layers
        self._model = model
        self._decoder = decoder
        self._embedding_width = embedding_width
        self._injected: Tensor | None = None
        self._captured = torch.empty(0)
        self._sampled: Tensor | None = None
        self._hook()

    def hidden(self, rows: Tensor, layout: Layout, kv: PagedKV) -> Tensor:
        """Run token ids [tokens] or hidden states [tokens, hidden]; return hidden states [tokens, hidden]."""
        self._forward(self._decoder, rows, layout, kv)
        return layout.flat(self._captured)

    def logits(self, rows: Tensor, layout: Layout, kv: PagedKV, sampled: Tensor) -> Tensor:
        """Run the last stage; return logits [len(sampled), vocabulary] of those flat rows of the forward."""
        if not len(sampled):
            self._forward(self._decoder, rows, layout, kv)
            return torch.empty(0, 0, device=rows.device)
        self._sampled = sampled
        logits: Tensor = self._forward(self._model, rows, layout, kv).logits
        return logits[0]

    def _forward(self, module: nn.Module, rows: Tensor, layout: Layout, kv: PagedKV) -> Any:
        kv.begin(layout)
        inputs = {"attention_mask": layout.attention_mask, "past_key_values": kv, "use_cache": True}
        batch = layout.batched(rows)
        if self._embedding_width is None:
            inputs["input_ids"] = batch
        else:
            self._injected = batch
            # Some families scale embeddings in place: they get zeros and not the hidden states.
            inputs["inputs_embeds"] = batch.new_zeros(*batch.shape[:2], self._embedding_width)
        token = CURRENT_LAYOUT.set(layout)
        try:
            return module(**inputs)
        finally:
            CURRENT_LAYOUT.reset(token)

    def _hook(self) -> None:
        if self._embedding_width is not None:
            self.layers[0].register_forward_pre_hook(self._inject, with_kwargs=True)
        self.layers[-1].register_forward_hook(self._capture)
        if "position_ids" in signature(self._decoder.forward).parameters:
            # At the decoder itself: not every model around it passes positions on.
            self._decoder.register_forward_pre_hook(_set_positions, with_kwargs=True)
        head = self._model.get_output_embeddings()
        if isinstance(head, nn.Linear | PackedLinear):
            head.register_forward_pre_hook(self._select)

    def _inject(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._injected, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._injected}

    def _capture(self, _module: nn.Module, _args: Any, out: Any) -> None:
        self._captured = out[0] if isinstance(out, tuple) else out

    def _select(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # The head is the largest product of the model: only rows that are sampled from go through it.
        assert self._sampled is not None
        return (args[0].flatten(0, -2)[self._sampled][None], *args[1:])


def _set_positions(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "position_ids": CURRENT_LAYOUT.get().position_ids}


class CutSkeleton:
    """A model on the meta device, cut to a span; `layers` and `decoder` are what is left of it."""

    def __init__(
        self, model: PreTrainedModel, architecture: Architecture, span: LayerSpan, *, tied_head: bool
    ) -> None:
        decoder_path, _, attribute = architecture.layers_path.rpartition(".")
        self.decoder = model.get_submodule(decoder_path)
        self._model = model
        self._span = span
        self._first, self._last = span.start == 0, span.end == len(architecture.layers)
        self._front = _with_parameters(self.decoder, architecture.front - architecture.back)
        self.embedding_width = model.get_input_embeddings().embedding_dim
        # A tied head takes its weight from the embedding: such a stage keeps the embedding until it is
        # loaded.
        self._borrows = tied_head and self._last and not self._first
        self.layers = self._keep_layers(attribute)
        self.decoder.config = _local_config(self.decoder.config, span, len(architecture.layers))
        self._drop_edges(model, architecture)

    def shrink_experts(self, layer: int, num_experts: int) -> Experts:
        """Leave room for `num_experts` experts of a layer; return the layer's experts as they were found."""
        block = self.layers[layer - self._span.start]
        found = experts_in(block)
        assert found is not None, f"layer {layer} has no experts"
        if num_experts:
            shrink_experts(found.module, num_experts)
        else:
            replace_module(block, found.path, nn.Identity())
        return found

    def drop_borrowed_embedding(self) -> None:
        """Put placeholders in place of the embedding, after the head took its weight."""
        if self._borrows:
            self._drop_front()

    def mark_modules_without_children(self) -> None:
        """Mark modules that lost a child, so that transformers does not initialise what is gone."""
        for module in self._model.modules():
            lost_one = any(isinstance(child, nn.Identity | _Absent) for child in module.children())
            if lost_one and not [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                mark_initialized(module)

    def _keep_layers(self, attribute: str) -> nn.ModuleList:
        kept = nn.ModuleList(
            list(self.decoder.get_submodule(attribute).children())[self._span.start : self._span.end]
        )
        for module in kept.modules():
            for name in _INDEX_NAMES:
                if isinstance(index := getattr(module, name, None), int):
                    setattr(module, name, index - self._span.start)
        setattr(self.decoder, attribute, kept)
        return kept

    def _drop_edges(self, model: PreTrainedModel, architecture: Architecture) -> None:
        if not self._first and not self._borrows:
            self._drop_front()
        if not self._last:
            for name in _with_parameters(self.decoder, architecture.back - architecture.front):
                setattr(self.decoder, name, nn.Identity())
            for path in _beside(model, architecture.layers_path):
                replace_module(model, path, nn.Identity())
        if not (self._first and self._last) and not self._borrows:
            model.all_tied_weights_keys = {}

    def _drop_front(self) -> None:
        for name in self._front:
            setattr(
                self.decoder,
                name,
                _Absent(is_embedding=isinstance(getattr(self.decoder, name), nn.Embedding)),
            )


class _Absent(nn.Module):
    """Placeholder for a module of the first stage: for an embedding it gives zero, else its argument."""

    def __init__(self, *, is_embedding: bool) -> None:
        super().__init__()
        self.weight = None
        self._is_embedding = is_embedding

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return torch.zeros((), device=first.device) if self._is_embedding else first


def _beside(model: nn.Module, layers_path: str) -> list[str]:
    """Return the paths of modules with parameters outside the decoder: the head and modules before it."""
    steps = layers_path.split(".")[:-1]
    return [
        ".".join((*steps[:depth], name))
        for depth in range(len(steps))
        for name, child in model.get_submodule(".".join(steps[:depth])).named_children()
        if name != steps[depth] and any(True for _ in child.parameters())
    ]


def _with_parameters(decoder: nn.Module, names: frozenset[str]) -> tuple[str, ...]:
    return tuple(
        name for name in sorted(names) if any(True for _ in decoder.get_submodule(name).parameters())
    )


def _local_config(config: PreTrainedConfig, span: LayerSpan, num_layers: int) -> PreTrainedConfig:
    """Return the decoder's config as if it had only the span's layers."""
    local = copy.deepcopy(config)
    for name, value in list(vars(local).items()):
        if isinstance(value, list | tuple) and len(value) == num_layers and name != "architectures":
            setattr(local, name, list(value)[span.start : span.end])
    local.num_hidden_layers = len(span)
    return local


def place_by_sequence_length(model: nn.Module) -> None:
    """Make every longrope module of a model choose its scale by the sequences of the current step."""
    found = [
        name for name, module in model.named_modules() if getattr(module, "rope_type", None) == "longrope"
    ]
    for name in found:
        replace_module(model, name, _BySequenceLength(model.get_submodule(name)))


class _BySequenceLength(nn.Module):
    """A rotary module that sees one more position, the sequence's last: by that one it chooses its scale."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self._rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        last = torch.full_like(position_ids[:, :1], CURRENT_LAYOUT.get().sequence_length - 1)
        shown = torch.cat([position_ids, last], dim=1)
        return tuple(part[:, :-1] for part in self._rotary(x, shown, *args, **kwargs))
