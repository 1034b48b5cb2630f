"""Where the pieces of a model are: what the planner returns and everything else follows."""

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


@dataclass(frozen=True, slots=True)
class PieceSet:
    """Pieces of a topology, by index, that are gone."""

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
class Prediction:
    """What the planner expects of a topology at the batch its policy asked for."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    tokens_per_s: float
    time_per_output_token_s: float
    lamports_per_token: int


@dataclass(frozen=True, slots=True)
class Topology:
    """Every layer on exactly one stage, every expert beside its router or in an expert set.

    `epoch` rises with every change; whoever gets something of an older one drops it.
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
        """What its pipeline is known by."""
        return self.model_id, self.revision, self.replica

    def stage_of(self, layer: int) -> Stage:
        """Return the stage that runs a layer."""
        return next(stage for stage in self.stages if layer in stage.span)

    @property
    def replicas(self) -> PieceSet:
        """The expert sets that it would be whole without."""
        return PieceSet(expert_sets=frozenset(one.index for one in self.expert_sets if one.is_replica))

    @property
    def pieces(self) -> tuple[Stage | ExpertSet, ...]:
        """The stages in order, then the expert sets."""
        return (*self.stages, *self.expert_sets)

    @property
    def vram_bytes_by_node(self) -> dict[str, int]:
        """VRAM that the topology takes on each node it uses."""
        return _vram_bytes_by_node(self.pieces)

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

    def vram_bytes_of(self, loss: PieceSet) -> dict[str, int]:
        """Return the VRAM that some pieces take, by node."""
        stages = [stage for stage in self.stages if stage.index in loss.stages]
        return _vram_bytes_by_node(
            (*stages, *(chosen for chosen in self.expert_sets if chosen.index in loss.expert_sets))
        )


def _vram_bytes_by_node(pieces: Iterable[Stage | ExpertSet]) -> dict[str, int]:
    used: dict[str, int] = {}
    for piece in pieces:
        used[piece.node_id] = used.get(piece.node_id, 0) + piece.vram_bytes
    return used


PieceKey = tuple[type[Stage] | type[ExpertSet], int]  # kind of piece, index


def key_of(piece: Stage | ExpertSet) -> PieceKey:
    """Return what a piece is known by."""
    return type(piece), piece.index


def keys_of(loss: PieceSet) -> frozenset[PieceKey]:
    """Return what is lost, piece by piece."""
    stages: list[PieceKey] = [(Stage, index) for index in loss.stages]
    return frozenset(stages + [(ExpertSet, index) for index in loss.expert_sets])


def loss_of(keys: Iterable[PieceKey]) -> PieceSet:
    """Return the loss of some pieces."""
    found = frozenset(keys)
    return PieceSet(
        stages=frozenset(index for kind, index in found if kind is Stage),
        expert_sets=frozenset(index for kind, index in found if kind is ExpertSet),
    )
