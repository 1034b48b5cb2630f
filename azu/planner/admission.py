"""What may run in the memory there is: jobs and models that never fit are told from those that may wait."""

from collections.abc import Sequence
from dataclasses import replace

from azu.errors import InsufficientCapacity, InvalidRequest
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import Structure
from azu.protocol.topology import Topology

# The code of errors that waiting does not help.
NEVER_FITS = "never_fits"


def refuse_what_never_fits(structure: Structure, topology: Topology, num_tokens: int) -> None:
    """Raise InvalidRequest with the bytes missing when `num_tokens` of one sequence never find room."""
    missing = -(-num_tokens // topology.block_size) - topology.num_blocks
    if missing <= 0:
        return
    kv_bytes_per_token = sum(layer.kv_bytes_per_token for layer in structure.layers)
    raise InvalidRequest(
        f"the prompt and its completion need KV for {num_tokens} tokens, {structure.model_id} has room for "
        f"{topology.num_blocks * topology.block_size}: "
        f"{missing * topology.block_size * kv_bytes_per_token} bytes are missing",
        code="insufficient_kv_cache",
    )


def refuse_what_no_waiting_helps(structure: Structure, nodes: Sequence[Node], policy: PlanPolicy) -> None:
    """Raise InsufficientCapacity with the bytes missing when a model would not fit even on idle nodes.

    Nodes that are suspect now may come back; those that leave will not. Whoever passes may wait for room.
    """
    idle = [
        replace(node, vram_free_bytes=node.vram_total_bytes, state=NodeState.ALIVE)
        for node in nodes
        if node.state in (NodeState.ALIVE, NodeState.SUSPECT)
    ]
    try:
        plan(structure, idle, policy)
    except InsufficientCapacity as error:
        raise InsufficientCapacity(
            error.message, code=NEVER_FITS, missing_bytes=error.missing_bytes
        ) from error
