"""A model's structure as in structure.json: enough to plan, price and verify without opening a shard."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from azu.errors import BrokenCheckpoint, plain_fault

STRUCTURE_FILE = "structure.json"
STRUCTURE_VERSION = 1
EMBED = "embed"
HEAD = "head"

# pydantic checks these when a structure is read: names become paths, and sizes are allocated.
_Count = Annotated[int, Field(ge=0, lt=2**48)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_ShardName = Annotated[str, Field(pattern=r"^(embed|head|layer_\d{1,6}_(dense|router|expert_\d{1,6}))$")]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]
_Dtype = Annotated[str, Field(pattern=r"^(float32|float16|bfloat16)$")]


class LayerKind(StrEnum):
    """A DENSE layer is one shard; a MOE layer is a router shard and one shard per expert."""

    DENSE = "dense"
    MOE = "moe"


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer.

    `kv_bytes_per_token` is the size of this layer's K and V for one token in the serving dtype.
    `num_experts` and `experts_per_token` are 0 for a dense layer.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    index: _Count
    kind: LayerKind
    kv_bytes_per_token: _Count
    num_experts: _Count = 0
    experts_per_token: _Count = 0


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype (torch's name, such as "bfloat16") and shape of one tensor in a shard."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    dtype: str
    shape: tuple[_Count, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of a cut model.

    `name` has no suffix: `embed`, `head`, `layer_3_dense`, `layer_4_router`, `layer_4_expert_7`.
    `size_bytes` is the size of the file, `weight_bytes` the size of its tensors alone.
    `active_parameters` counts the parameters that one token uses (an embedding lookup uses one row).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: _ShardName
    size_bytes: _Count
    weight_bytes: _Count
    sha256: _Sha256
    active_parameters: _Count
    tensors: Mapping[str, TensorInfo]

    @property
    def file_name(self) -> str:
        """The shard's file inside the model's folder."""
        return f"{self.name}.safetensors"


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A config or tokenizer file that travels with the shards."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: _FileName
    size_bytes: _Count
    sha256: _Sha256


@dataclass(frozen=True, slots=True)
class Structure:
    """A model after the cut. `revision` is a commit or a content hash, so it never changes its meaning."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    model_id: str
    revision: str
    architecture: str
    dtype: _Dtype
    hidden_size: Annotated[_Count, Field(ge=1)]
    vocab_size: Annotated[_Count, Field(ge=1)]
    context_length: Annotated[_Count, Field(ge=1)]
    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=1024)]
    shards: tuple[Shard, ...]
    files: tuple[ModelFile, ...]
    # The head's weight is the embedding's: then the last stage loads the embed shard too.
    tied_head: bool = False
    # A sequence with more tokens than this is computed anew, because all its positions change (longrope).
    restart_length: int | None = None
    # The dtype of most of the checkpoint's weights.
    stored_dtype: str | None = None
    version: int = STRUCTURE_VERSION
    _by_name: dict[str, Shard] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._by_name.update({shard.name: shard for shard in self.shards})

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.layers)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one value in the serving dtype."""
        return {"float32": 4, "float16": 2, "bfloat16": 2}[self.dtype]

    @property
    def may_overflow(self) -> bool:
        """Whether the weights were trained with a range of values that the serving dtype does not have."""
        return self.dtype == "float16" and self.stored_dtype == "bfloat16"

    def shard(self, name: str) -> Shard:
        """Return the shard with a name; raises KeyError if the model has none."""
        return self._by_name[name]

    def layer_shard(self, index: int) -> Shard:
        """Return the dense or router shard of a layer."""
        kind = "dense" if self.layers[index].kind is LayerKind.DENSE else "router"
        return self._by_name[f"layer_{index}_{kind}"]

    def expert_shard(self, index: int, expert: int) -> Shard:
        """Return the shard of one expert of a MoE layer."""
        return self._by_name[f"layer_{index}_expert_{expert}"]

    def edge_shards(self, start: int, end: int) -> Iterator[Shard]:
        """Yield the shards that a stage needs beside its layers [start, end): embedding, final norm, head."""
        if start == 0 or (end == self.num_layers and self.tied_head):
            yield self._by_name[EMBED]
        if end == self.num_layers:
            yield self._by_name[HEAD]

    def to_json(self) -> bytes:
        """Return structure.json's content."""
        exclude: Any = {"_by_name"}
        return _ADAPTER.dump_json(self, indent=1, exclude=exclude)

    @classmethod
    def from_json(cls, content: bytes | str, *, where: str = STRUCTURE_FILE) -> "Structure":
        """Parse structure.json; raises BrokenCheckpoint that names `where` if the content is malformed."""
        try:
            structure = _ADAPTER.validate_json(content, strict=True)
        except ValidationError as error:
            raise BrokenCheckpoint(f"{where}: {': '.join(plain_fault(error.errors()))}") from error
        if fault := _contradiction(structure):
            raise BrokenCheckpoint(f"{where}: {fault}")
        return structure


def _contradiction(structure: Structure) -> str | None:
    """Return the first contradiction between the parts of a structure, None if there is none."""
    if structure.version != STRUCTURE_VERSION:
        return f"its version is {structure.version!r}, and this azu reads version {STRUCTURE_VERSION}"
    expected = [EMBED, HEAD]
    for position, layer in enumerate(structure.layers):
        is_moe = layer.kind is LayerKind.MOE
        if layer.index != position or is_moe != (layer.num_experts > 0):
            return f"layer {position} contradicts itself"
        if layer.experts_per_token > layer.num_experts:
            return f"layer {position} sends a token to more experts than it has"
        if layer.num_experts > len(structure.shards):
            return f"layer {position} has more experts than there are shards"
        expected.append(f"layer_{position}_{'router' if is_moe else 'dense'}")
        expected += [f"layer_{position}_expert_{expert}" for expert in range(layer.num_experts)]
    if sorted(expected) != sorted(shard.name for shard in structure.shards):
        return "its shards are not those of its layers"
    return None


_ADAPTER = TypeAdapter(Structure)
