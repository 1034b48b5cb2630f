"""A model as its config describes it, before any weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass

from azu.protocol.structure import Layer


@dataclass(frozen=True, slots=True)
class Architecture:
    """A causal language model's shape.

    `layers_path` is the dotted path of the decoder's layer list ("model.layers", "transformer.h").
    `front` and `back` name the decoder's children that run before and after the layers; `unused` holds the
    paths of modules that text never runs through, such as a vision tower.
    """

    name: str
    dtype: str
    hidden_size: int
    vocab_size: int
    context_length: int
    layers: tuple[Layer, ...]
    layers_path: str
    front: frozenset[str]
    back: frozenset[str]
    # A sequence longer than this many tokens is computed again: all its positions change (longrope).
    restart_length: int | None = None
    unused: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model with all that pricing and tokenising need; `files` maps names to config and tokenizer files."""

    model_id: str
    revision: str
    architecture: Architecture
    files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class AvailableModel:
    """A model that is served without a download: it is built in or cut already."""

    model_id: str
    revision: str
    num_layers: int
    context_length: int
