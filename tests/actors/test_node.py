"""What the scheduler knows of nodes that are there, and of those that went."""

import asyncio
from pathlib import Path

import pytest

from actors.node import NodeAgents
from actors.placement import WorkerNode
from azu.cluster.nodes import NodeTable
from azu.config.network import load_network
from tests.builders import OWNERS, node

HERE = WorkerNode("node-1", "node-1", OWNERS[0], "cpu", 1, "192.0.2.7:7")


def test_of_nodes_that_went_the_latest_are_kept_and_none_of_them_makes_the_network_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actors.node._KEPT_NODES", 2)
    monkeypatch.setattr("actors.node.start_on_node", lambda *_, **__: None)
    agents = NodeAgents(load_network().policy.heartbeat, Path(), NodeTable(suspect_s=1.0, dead_s=1.0))
    agents.nodes |= {f"node-{number}": node(f"node-{number}") for number in range(1, 6)}

    for living, kept in (((HERE,), {"node-1", "node-4", "node-5"}), ((), {"node-4", "node-5"})):
        monkeypatch.setattr("actors.node.worker_nodes", lambda living=living: (living, frozenset()))
        asyncio.run(agents.follow_nodes())

        assert agents.nodes.keys() == kept
        assert agents.has_reports == bool(living)
