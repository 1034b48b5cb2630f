"""What is known of a model before it is paid for; light to import wherever it travels."""

from collections.abc import Mapping
from dataclasses import dataclass

from azu.architecture.description import Architecture


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What pricing and tokenising need; `files` holds the config and tokenizer files by name."""

    model_id: str
    revision: str
    architecture: Architecture
    files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that can be asked for at once: it is built in or cut."""

    model_id: str
    revision: str
    num_layers: int
    context_length: int
