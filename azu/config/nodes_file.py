"""The nodes file of `azu plan`: the nodes that a plan may use. configs/nodes.example.yaml is an example.

    nodes:
      - name: ada                 # unique; ties in a plan are broken by it
        vram: 24GiB               # free VRAM: K, M, G and T are powers of 1024
        memory_gb_per_s: 1008     # memory bandwidth in 10^9 bytes per second; 400 if not given
        tflops: 80                # in the serving dtype; 20 if not given
        state: alive              # alive (if not given), suspect, leaving or dead; pieces need alive
        cached_shards: [embed, layer_0_dense]   # names of the shards on its disk, or "all"
        links_ms: {ben: 20}       # one-way latency to other nodes of the file; the policy's hop if not given

Only `name` and `vram` are required. Unknown keys are refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from azu.config.settings import Size, configuration_error
from azu.errors import ConfigurationError
from azu.files import read_yaml
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import Structure

_NO_PAYOUT = "0x" + "0" * 40


Speed = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _PlannedNode(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=64)]
    vram: Size
    memory_gb_per_s: Speed = 400.0
    tflops: Speed = 20.0
    state: NodeState = NodeState.ALIVE
    cached_shards: tuple[str, ...] | Literal["all"] = ()
    links_ms: Mapping[str, Speed] = Field(default_factory=dict)


class _NodesFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    nodes: Annotated[tuple[_PlannedNode, ...], Field(min_length=1)]


def read_nodes(path: Path, structure: Structure) -> tuple[Node, ...]:
    """Return the nodes of a file; the names of cached shards are those in `structure`.

    Raises ConfigurationError that names the file and each bad key.
    """
    try:
        found = _NodesFile.model_validate(read_yaml(path))
    except ValidationError as error:
        raise configuration_error(error, str(path)) from error
    names = [node.name for node in found.nodes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"{path}: several nodes are called {', '.join(twice)}", param="nodes")
    if strangers := sorted({name for node in found.nodes for name in node.links_ms} - set(names)):
        raise ConfigurationError(f"{path}: links to unknown nodes: {', '.join(strangers)}", param="nodes")
    return tuple(_node(path, node, structure) for node in found.nodes)


def _node(path: Path, planned: _PlannedNode, structure: Structure) -> Node:
    by_name = {shard.name: shard.sha256 for shard in structure.shards}
    cached = by_name.keys() if planned.cached_shards == "all" else planned.cached_shards
    if unknown := sorted(set(cached) - by_name.keys()):
        raise ConfigurationError(
            f"{path}: {planned.name}: {structure.model_id} has no shard {', '.join(unknown)}", param="nodes"
        )
    return Node(
        node_id=planned.name,
        name=planned.name,
        payout_address=_NO_PAYOUT,
        vram_total_bytes=planned.vram,
        vram_free_bytes=planned.vram,
        memory_bytes_per_s=planned.memory_gb_per_s * 1e9,
        flops_per_s=planned.tflops * 1e12,
        state=planned.state,
        cached_shards=frozenset(by_name[name] for name in cached),
        links_s={name: latency_ms / 1000 for name, latency_ms in planned.links_ms.items()},
    )
