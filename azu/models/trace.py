"""Trace one forward on the meta device: the modules around the layers, each layer's inputs and state."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from azu.errors import UnsupportedModel, plain_reason
from azu.models.compat import is_recurrent
from azu.models.skeleton import (
    LayerList,
    experts_in,
    find_layers,
    named_embeddings,
    replace_module,
    silence_padding_warnings,
)
from azu.models.slim import without_compiler

# Five is odd and larger than one, so that it is not mistaken for a number of heads or a batch size.
_NUM_TOKENS = 5


@dataclass(frozen=True, slots=True)
class Trace:
    """How a model runs five tokens.

    `front` and `back` name the decoder's children that run before and after the layers, `unused` the paths of
    modules around the layers that hold parameters and never run.
    `kv_values[i]` is the number of values that layer i caches per token; `experts_per_token[i]` is 0 for a
    dense layer.
    """

    layers: LayerList
    front: frozenset[str]
    back: frozenset[str]
    unused: frozenset[str]
    hidden_size: int
    kv_values: tuple[int, ...]
    experts_per_token: tuple[int, ...]


class _CannotCut(Exception):
    """The forward did something that a model cut into stages cannot do."""


class _KeptValues(DynamicLayer):  # type: ignore[misc] # transformers is untyped
    """Counts the values that one layer caches, and refuses any state other than K and V."""

    def __init__(self) -> None:
        super().__init__()
        self.num_values = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.num_values:
            raise _CannotCut("a layer keeps two pairs of keys and values")
        for states in (key_states, value_states):
            if states.dim() != 4 or states.shape[0] != 1 or states.shape[2] != _NUM_TOKENS:
                raise _CannotCut("a layer keeps something other than one key and value per token")
            self.num_values += states.shape[1] * states.shape[3]
        return super().update(key_states, value_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("update_", "get_")):
            raise _CannotCut("its layers keep a state beside keys and values")
        raise AttributeError(name)


class _KeysAndValues(Cache):  # type: ignore[misc]
    """A cache that refuses any state other than keys and values."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise _CannotCut("its layers keep a state beside keys and values")

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = _refuse


class _ExpertsProbe(nn.Module):
    """Replaces an experts module, whose routing needs values that the meta device does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.experts_per_token = 0

    def forward(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        if hidden.dim() != 2 or expert_ids.shape != weights.shape or len(expert_ids) != len(hidden):
            raise _CannotCut("its experts do not take (hidden states, expert ids, weights) per token")
        self.experts_per_token = expert_ids.shape[1]
        return hidden * weights.sum()


@dataclass(slots=True)
class _TraceLog:
    """The observations of the hooks, in order."""

    token_ids: Tensor
    attribute: str
    order: list[str] = field(default_factory=list)
    entered: int = 0
    state: Tensor | None = None


def trace(model: PreTrainedModel) -> Trace:
    """Run five tokens through a model on the meta device and return how it can be cut.

    The model cannot be used afterwards: it has hooks, and its experts are replaced.
    Raises UnsupportedModel with the reason when its layers do not pass on exactly one vector per token.
    """
    family = model.config.model_type
    if is_recurrent(model):
        raise UnsupportedModel(f"{family} is recurrent: its layers keep a state that is no KV cache")
    found = find_layers(model)
    layers = list(model.get_submodule(found.path))
    probes = [_put_probe(layer) for layer in layers]
    log = _TraceLog(torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device="meta"), found.attribute)
    kept = [_KeptValues() for _ in layers]
    idle = _watch_surroundings(model, found)
    _watch_decoder(model, found, log)
    try:
        with without_compiler:
            logits = _forward(model, log.token_ids, _KeysAndValues(layers=kept))
    except _CannotCut as error:
        raise UnsupportedModel(f"{family} cannot be cut: {error}") from error
    except Exception as error:  # forward code of a family raises errors of many types
        fault = plain_reason(error, "its sizes do not fit each other, or its code needs the weights' values")
        raise UnsupportedModel(f"{family} cannot be cut: {fault}") from error
    reason = _why_not(log, kept, logits)
    if reason is not None or log.state is None:
        raise UnsupportedModel(f"{family} cannot be cut: {reason}")
    first = log.order.index(found.attribute)
    last = len(log.order) - log.order[::-1].index(found.attribute)
    return Trace(
        layers=found,
        front=frozenset(log.order[:first]),
        back=frozenset(log.order[last:]),
        unused=frozenset(idle),
        hidden_size=log.state.shape[2],
        kv_values=tuple(layer.num_values for layer in kept),
        experts_per_token=tuple(probe.experts_per_token if probe else 0 for probe in probes),
    )


def _why_not(log: _TraceLog, kept: list[_KeptValues], logits: Tensor) -> str | None:
    if log.entered != len(kept):
        return f"{log.entered} layers ran where {len(kept)} are listed"
    if log.order[0] == log.attribute:
        return "its embeddings do not stand beside its layers"
    for index, layer in enumerate(kept):
        if not layer.num_values:
            return f"layer {index} keeps no keys and values of its own"
    if logits.requires_grad:
        return "what follows the layers needs more than their hidden state"
    return None


def _forward(model: PreTrainedModel, token_ids: Tensor, cache: Cache) -> Tensor:
    # Gradients show which tensors depend on the tokens: embeddings are the leaves, and a layer's output is
    # detached by its hook.
    model.requires_grad_(False)
    silence_padding_warnings(model)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits: Tensor = model(input_ids=token_ids, past_key_values=cache, use_cache=True).logits
    return logits


def _watch_surroundings(model: PreTrainedModel, found: LayerList) -> set[str]:
    """Return the paths of the modules around the layers; a hook removes a path when its module runs."""
    head = model.get_output_embeddings()
    idle: set[str] = set()
    steps = found.path.split(".")
    for depth in range(len(steps)):
        parent = model.get_submodule(".".join(steps[:depth]))
        for name, child in parent.named_children():
            holds_parameters = any(True for _ in child.parameters())
            if name == steps[depth] or not holds_parameters or any(one is head for one in child.modules()):
                continue
            path = ".".join((*steps[:depth], name))
            idle.add(path)
            for module in child.modules():
                module.register_forward_pre_hook(lambda *_, path=path: idle.discard(path))
    return idle


def _watch_decoder(model: PreTrainedModel, found: LayerList, log: _TraceLog) -> None:
    decoder = model.get_submodule(found.decoder_path)
    layers = list(decoder.get_submodule(found.attribute))
    for name, child in decoder.named_children():
        if name != found.attribute:
            child.register_forward_pre_hook(lambda *_, name=name: log.order.append(name))
    for _, embedding in named_embeddings(model):
        embedding.register_forward_hook(lambda _module, _args, out: out.requires_grad_().clone())
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(_entering(log), with_kwargs=True)
        layer.register_forward_hook(_leaving(log, last=index == len(layers) - 1))


def _entering(log: _TraceLog) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        log.order.append(log.attribute)
        log.entered += 1
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not _is_state(hidden):
            raise _CannotCut("its layers do not take one hidden state per token first")
        if log.state is not None and hidden is not log.state:
            raise _CannotCut("something happens to the hidden states between its layers")
        for tensor in _tensors(chain(args[1:], kwargs.values())):
            if tensor is not hidden and (tensor.requires_grad or tensor is log.token_ids):
                raise _CannotCut("its layers take more per token than the hidden state")

    return hook


def _leaving(log: _TraceLog, *, last: bool) -> Any:
    def hook(_module: nn.Module, _args: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        if not _is_state(first):
            raise _CannotCut("its layers do not give one hidden state per token first")
        log.state = first
        if not last:
            return None
        return (first.detach(), *out[1:]) if isinstance(out, tuple) else first.detach()

    return hook


def _is_state(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == (1, _NUM_TOKENS)


def _put_probe(layer: nn.Module) -> _ExpertsProbe | None:
    found = experts_in(layer)
    if found is None:
        return None
    probe = _ExpertsProbe()
    replace_module(layer, found.path, probe)
    return probe


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
