"""Ray's nodes as azu sees them."""

import pytest
import ray

from actors.placement import VRAM, worker_nodes


def test_a_label_that_ray_takes_stands_for_the_one_gpu_that_a_node_sees(
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
    monkeypatch.setattr(ray, "nodes", lambda: nodes)

    assert {node.name: node.device for node in worker_nodes()} == {
        "gpu": "cuda:0", "cpu": "cpu", "bare": "cpu"
    }  # fmt: skip
