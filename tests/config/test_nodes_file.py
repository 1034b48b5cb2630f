"""A nodes file lists the nodes of a plan; an error names each bad key."""

from importlib.resources import files
from pathlib import Path

import pytest

from azu.config.nodes_file import read_nodes
from azu.errors import ConfigurationError
from azu.protocol.node import Node, NodeState
from azu.units import GIB
from tests.builders import structure

MODEL = structure(2)


def read(folder: Path, content: str) -> tuple[Node, ...]:
    path = folder / "nodes.yaml"
    path.write_text(content)
    return read_nodes(path, MODEL)


def test_sizes_speeds_and_cached_shards_are_read(tmp_path: Path) -> None:
    ada, ben = read(
        tmp_path,
        """
        nodes:
          - {name: ada, vram: 24GiB, memory_gb_per_s: 1008, tflops: 165,
             cached_shards: [embed], links_ms: {ben: 20}}
          - {name: ben, vram: 1.5GiB, state: leaving, cached_shards: all}
        """,
    )

    assert (ada.node_id, ada.vram_free_bytes, ada.vram_total_bytes) == ("ada", 24 * GIB, 24 * GIB)
    assert (ada.memory_bytes_per_s, ada.flops_per_s, ada.state) == (1.008e12, 1.65e14, NodeState.ALIVE)
    assert ada.cached_shards == {MODEL.shard("embed").sha256}
    assert ada.links_s == {"ben": 0.02}
    assert (ben.vram_free_bytes, ben.state) == (3 * GIB // 2, NodeState.LEAVING)
    assert ben.cached_shards == {shard.sha256 for shard in MODEL.shards}


def test_the_example_is_a_nodes_file() -> None:
    nodes = read_nodes(Path(str(files("configs") / "nodes.example.yaml")), MODEL)
    assert len(nodes) >= 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nodes: [{name: a, vram: 1GiB, vrma: 2GiB}]", r"nodes\.0\.vrma: Extra"),
        ("nodes: [{name: a, vram: 1GiB}]\nnode: []", "node: Extra"),
        ("nodes: [{name: a, vram: lots}]", r"nodes\.0\.vram: .*'lots' is not a size"),
        ("nodes: [{name: a, vram: -1}]", r"nodes\.0\.vram: .*is not a size"),
        ("nodes: [{name: a}]", r"nodes\.0\.vram: Field required"),
        ("nodes: [{name: a, vram: 1GiB, tflops: 0}]", r"nodes\.0\.tflops: .*greater than 0"),
        ("nodes: [{name: a, vram: 1GiB, memory_gb_per_s: .inf}]", r"memory_gb_per_s: .*finite"),
        ("nodes: [{name: a, vram: 1GiB, state: asleep}]", r"nodes\.0\.state"),
        ("nodes: [{name: a, vram: 1GiB}, {name: b, vram: 1GiB}, {name: a, vram: 1GiB}]", "called a$"),
        ("nodes: [{name: a, vram: 1GiB, cached_shards: [embed, layer_9_dense]}]", "a: .*layer_9_dense"),
        ("nodes: [{name: a, vram: 1GiB, links_ms: {b: 5}}]", "unknown nodes: b$"),
        ("nodes: [{name: a, vram: 1GiB, links_ms: {a: -5}}]", "links_ms.*greater than 0"),
        ("nodes: []", "nodes: "),
        ("", "nodes.yaml: "),
        ("nodes: [", "nodes.yaml is damaged: .*line 1"),
    ],
)
def test_the_error_names_the_bad_key_and_the_file(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as refused:
        read(tmp_path, content)
    assert refused.value.message.startswith(str(tmp_path / "nodes.yaml"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere"):
        read_nodes(tmp_path / "nowhere.yaml", MODEL)
