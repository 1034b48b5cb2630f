"""Ray's nodes as azu sees them."""

import pytest
import ray

from actors.placement import VRAM, worker_nodes


def test_a_label_stands_for_the_one_gpu_that_a_node_sees_and_ended_nodes_are_told_from_dead_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = {"gpu": {"azu-device": "cuda"}, "cpu": {"azu-device": "cpu"}, "bare": {}}
    nodes = [
        {
            "NodeID": name,
            "Labels": {"azu-name": name, "azu-payout": "0x1", **own},
            "Resources": {VRAM: 2},
            "NodeManagerAddress": "192.0.2.7",
            "NodeManagerPort": 7,
            "Alive": True,
        }
        for name, own in labels.items()
    ]
    gone = [{"NodeID": "ended", "DeathReason": 1}, {"NodeID": "died", "DeathReason": 2}]
    found = nodes + [{**nodes[0], **one, "Alive": False} for one in gone]
    monkeypatch.setattr(ray, "nodes", lambda: found)

    living, ended = worker_nodes()
    assert {node.name: node.device for node in living} == {"gpu": "cuda:0", "cpu": "cpu", "bare": "cpu"}
    assert ended == {"ended"}
