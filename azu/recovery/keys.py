"""What the pieces of a running model are known by: a stage and an expert set may have the same index."""

from collections.abc import Iterable

from azu.protocol.topology import ExpertSet, Loss, Stage

Key = tuple[type[Stage] | type[ExpertSet], int]  # kind of piece, index


def key_of(piece: Stage | ExpertSet) -> Key:
    """Return what a piece is known by."""
    return type(piece), piece.index


def keys_of(loss: Loss) -> frozenset[Key]:
    """Return what is lost, piece by piece."""
    stages: list[Key] = [(Stage, index) for index in loss.stages]
    return frozenset(stages + [(ExpertSet, index) for index in loss.expert_sets])


def loss_of(keys: Iterable[Key]) -> Loss:
    """Return the loss of some pieces."""
    found = frozenset(keys)
    return Loss(
        stages=frozenset(index for kind, index in found if kind is Stage),
        expert_sets=frozenset(index for kind, index in found if kind is ExpertSet),
    )
