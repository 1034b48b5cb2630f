"""Weights that the config ties together: which of them the checkpoint really holds once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from azu.sharding.checkpoint import StoredTensor, read_range
from azu.sharding.names import Destination


@dataclass(frozen=True, slots=True)
class Untied:
    """A checkpoint's tensors without the copies of tied weights.

    `tied` holds the parameters that have no tensor of their own, each with the one they take theirs from.
    """

    tensors: dict[str, StoredTensor]
    destinations: dict[str, Destination]
    tied: dict[str, str]


def drop_tied_copies(
    tensors: Mapping[str, StoredTensor], destinations: Mapping[str, Destination], ties: Mapping[str, str]
) -> Untied:
    """Keep one tensor per tied weight, under the owner's place; `ties` maps a parameter to its owner.

    As in transformers, two tensors that differ are not tied, whatever the config says; and a checkpoint may
    hold the weight under the other parameter's name alone.
    """
    result = Untied(dict(tensors), dict(destinations), {})
    names = {destination.parameter: name for name, destination in destinations.items()}
    for parameter, owner in ties.items():
        copy, original = names.get(parameter), names.get(owner)
        if copy is not None and original is not None and not _same(tensors[copy], tensors[original]):
            continue
        result.tied[parameter] = owner
        if copy is None:
            continue
        del result.tensors[copy]
        destination = result.destinations.pop(copy)
        if original is None:
            result.tensors[owner] = replace(tensors[copy], name=owner)
            result.destinations[owner] = replace(destination, parameter=owner)
    return result


def _same(left: StoredTensor, right: StoredTensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    ranges = (read_range(tensor, tensor.offset, tensor.size_bytes) for tensor in (left, right))
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(*ranges, strict=True))
