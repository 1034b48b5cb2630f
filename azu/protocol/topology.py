"""Where the pieces of a model are: the planner returns a topology, everything else follows it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pydantic import ConfigDict

PipelineKey = tuple[str, str, int]  # model id, revision, replica


@dataclass(frozen=True, slots=True, order=True)
class LayerSpan:
    """Layers [start, end) of a model."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and self.start <= layer < self.end


@dataclass(frozen=True, slots=True)
class Stage:
    """A layer span on a node; `experts` maps each of its MoE layers to the experts held beside the router."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    index: int
    node_id: str
    span: LayerSpan
    experts: Mapping[int, tuple[int, ...]]
    vram_bytes: int


@dataclass(frozen=True, slots=True)
class ExpertSet:
    """Experts on a node apart from their routers: layer -> expert ids.

    Those of a replica are in other sets too: when it is lost nothing is missing.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    index: int
    node_id: str
    experts: Mapping[int, tuple[int, ...]]
    vram_bytes: int
    is_replica: bool = False


Piece = Stage | ExpertSet
PieceKey = tuple[type[Stage] | type[ExpertSet], int]  # kind of piece, index


@dataclass(frozen=True, slots=True)
class PieceSet:
    """Some pieces of a topology, by index."""

    stages: frozenset[int] = frozenset()
    expert_sets: frozenset[int] = frozenset()

    def __or__(self, other: "PieceSet") -> "PieceSet":
        return PieceSet(self.stages | other.stages, self.expert_sets | other.expert_sets)

    def __and__(self, other: "PieceSet") -> "PieceSet":
        return PieceSet(self.stages & other.stages, self.expert_sets & other.expert_sets)

    def __sub__(self, other: "PieceSet") -> "PieceSet":
        return PieceSet(self.stages - other.stages, self.expert_sets - other.expert_sets)

    def __bool__(self) -> bool:
        return bool(self.stages or self.expert_sets)

    def __str__(self) -> str:
        stages = [f"stage {index}" for index in sorted(self.stages)]
        sets = [f"expert set {index}" for index in sorted(self.expert_sets)]
        return ", ".join(stages + sets) or "nothing"


@dataclass(frozen=True, slots=True)
class LossReport:
    """Pieces that stages reported as lost under an epoch; `is_bad_frame` when they sent a bad frame."""

    lost: PieceSet
    epoch: int
    is_bad_frame: bool


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the planner expects of a topology at the batch its policy asked for."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    tokens_per_s: float
    time_per_output_token_s: float
    lamports_per_token: int


@dataclass(frozen=True, slots=True)
class Topology:
    """Every layer on exactly one stage, every expert beside its router or in an expert set.

    `epoch` rises with every change; an actor drops what belongs to an older one.
    `num_blocks` is the KV capacity that every stage has, in blocks of `block_size` tokens.
    Pipelines of the same model are told apart by `replica`.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    model_id: str
    revision: str
    epoch: int
    stages: tuple[Stage, ...]
    expert_sets: tuple[ExpertSet, ...]
    num_blocks: int
    block_size: int
    prediction: Prediction
    replica: int = 0

    @property
    def key(self) -> PipelineKey:
        """The key of its pipeline."""
        return self.model_id, self.revision, self.replica

    def stage_of(self, layer: int) -> Stage:
        """Return the stage that runs a layer."""
        return next(stage for stage in self.stages if layer in stage.span)

    @property
    def replicas(self) -> PieceSet:
        """The expert sets without which every expert is still held."""
        return PieceSet(expert_sets=frozenset(one.index for one in self.expert_sets if one.is_replica))

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The stages in order, then the expert sets."""
        return (*self.stages, *self.expert_sets)

    @property
    def piece_set(self) -> PieceSet:
        """All pieces, as a set."""
        return piece_set(map(key_of, self.pieces))

    @property
    def vram_bytes_by_node(self) -> dict[str, int]:
        """VRAM that the topology takes on each node it uses."""
        return room_of(self.pieces)

    def without(self, replicas: PieceSet) -> "Topology":
        """Return the topology without some of its replicas."""
        left = tuple(one for one in self.expert_sets if one.index not in replicas.expert_sets)
        return replace(self, expert_sets=left)

    def on_node(self, node_id: str) -> PieceSet:
        """Return the pieces that a node holds."""
        return PieceSet(
            frozenset(stage.index for stage in self.stages if stage.node_id == node_id),
            frozenset(chosen.index for chosen in self.expert_sets if chosen.node_id == node_id),
        )

    def vram_bytes_of(self, pieces: PieceSet) -> dict[str, int]:
        """Return the VRAM that some pieces take, by node."""
        return room_of(piece for piece in self.pieces if key_of(piece) in keys_of(pieces))


def room_of(pieces: Iterable[Piece]) -> dict[str, int]:
    """Return the VRAM that some pieces take, by node."""
    used: dict[str, int] = {}
    for piece in pieces:
        used[piece.node_id] = used.get(piece.node_id, 0) + piece.vram_bytes
    return used


def key_of(piece: Piece) -> PieceKey:
    """Return the key of a piece."""
    return type(piece), piece.index


def keys_of(pieces: PieceSet) -> frozenset[PieceKey]:
    """Return the keys of some pieces."""
    stages: list[PieceKey] = [(Stage, index) for index in pieces.stages]
    return frozenset(stages + [(ExpertSet, index) for index in pieces.expert_sets])


def piece_set(keys: Iterable[PieceKey]) -> PieceSet:
    """Return the pieces that have these keys."""
    found = frozenset(keys)
    return PieceSet(
        stages=frozenset(index for kind, index in found if kind is Stage),
        expert_sets=frozenset(index for kind, index in found if kind is ExpertSet),
    )


def actor_name(kind: str, *parts: object) -> str:
    """Return the name of an actor, such as "layer:azu-tiny-dense:1:0"."""
    return ":".join([kind, *(re.sub(r"[^\w.-]", "-", str(part)) for part in parts)])
