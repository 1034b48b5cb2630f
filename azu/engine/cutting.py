"""A model on the meta device, reduced to the layers and edges that one stage runs."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from azu.architecture.description import Architecture
from azu.architecture.skeleton import Experts, experts_in, replace_module
from azu.engine.experts import shrink
from azu.protocol.topology import LayerSpan

# How families call a layer's number, with which it finds its place in the KV cache.
_INDEX_NAMES = ("layer_idx", "layer_id")


class CutSkeleton:
    """Cuts a model to a span; `layers` and `decoder` are what is left of it."""

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
        # A tied head takes its weight from the embedding, which such a stage holds until it is loaded.
        self._borrows = tied_head and self._last and not self._first
        self.layers = self._keep_layers(attribute)
        self.decoder.config = _local_config(self.decoder.config, span, len(architecture.layers))
        self._drop_edges(model, architecture)

    def shrink_experts(self, layer: int, num_experts: int) -> Experts:
        """Leave room for that many experts of a layer."""
        block = self.layers[layer - self._span.start]
        found = experts_in(block)
        assert found is not None, f"layer {layer} has no experts"
        if num_experts:
            shrink(found.module, num_experts)
        else:
            replace_module(block, found.path, nn.Identity())
        return found

    def drop_borrowed_embedding(self) -> None:
        """Put stand-ins where the embedding was, once its weight is the head's."""
        if self._borrows:
            self._drop_front()

    def spare_from_initialisation(self) -> None:
        """Mark modules that lost a child, so that transformers does not initialise what is gone."""
        for module in self._model.modules():
            lost_one = any(isinstance(child, nn.Identity | _Absent) for child in module.children())
            if lost_one and not [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                module._is_hf_initialized = True  # a flag of transformers

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
    """Stands for a module of the first stage: an embedding gives zero, anything else its argument."""

    def __init__(self, *, is_embedding: bool) -> None:
        super().__init__()
        self.weight = None
        self._is_embedding = is_embedding

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return torch.zeros((), device=first.device) if self._is_embedding else first


def _beside(model: nn.Module, layers_path: str) -> list[str]:
    """Return the paths of modules with parameters outside the decoder: the head and what leads to it."""
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
