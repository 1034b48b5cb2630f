"""What can never run is refused with the bytes missing; what may run later passes."""

import re

import pytest

from azu.errors import InsufficientCapacity, InvalidRequest
from azu.planner.admission import refuse_what_never_fits, refuse_what_no_waiting_helps
from azu.planner.plan import plan
from azu.protocol.node import NodeState
from azu.units import MIB
from tests.builders import node, structure
from tests.planner.test_plan import POLICY


def test_a_job_is_refused_with_the_kv_bytes_that_are_missing() -> None:
    model = structure(4, kv_bytes_per_token=1024)
    topology = plan(model, [node("a")], POLICY)
    room = topology.num_blocks * topology.block_size
    refuse_what_never_fits(model, topology, room)

    with pytest.raises(
        InvalidRequest, match=rf"need KV for {room + 1} tokens.*{16 * 4 * 1024} bytes are missing"
    ):
        refuse_what_never_fits(model, topology, room + 1)


def test_a_model_may_wait_for_nodes_that_are_full_or_silent() -> None:
    model = structure(4)
    for waiting in (node("a", vram_free_bytes=0), node("a", state=NodeState.SUSPECT)):
        with pytest.raises(InsufficientCapacity):
            plan(model, [waiting], POLICY)
        refuse_what_no_waiting_helps(model, [waiting], POLICY)


@pytest.mark.parametrize("state", [NodeState.LEAVING, NodeState.DEAD])
def test_a_model_is_refused_when_no_waiting_helps(state: NodeState) -> None:
    model = structure(4)
    with pytest.raises(InsufficientCapacity) as refused:
        refuse_what_no_waiting_helps(model, [node("a", 4 * MIB), node("b", state=state)], POLICY)

    assert refused.value.code == "never_fits"
    assert re.search(r"\d+ bytes are missing", refused.value.message)
