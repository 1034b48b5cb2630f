"""`azu plan` previews a placement from a nodes file, for people and for programs."""

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from azu.cli.plan import plan
from azu.errors import InsufficientCapacity
from azu.protocol.structure import STRUCTURE_FILE
from tests.builders import structure
from tests.models.checkpoints import save_checkpoint

ROOM = """
nodes:
  - {name: ada, vram: 6MiB, memory_gb_per_s: 10, tflops: 0.1}
  - {name: ben, vram: 6MiB, memory_gb_per_s: 10, tflops: 0.1}
  - {name: cleo, vram: 6MiB, memory_gb_per_s: 10, tflops: 0.1}
"""
POLICY = """
policy:
  kv: {promised_sequences: 2, tokens_per_sequence: 128}
  planner: {margin_bytes: 0, batch_size: 1}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AZU_HOME", str(tmp_path / "home"))
    (tmp_path / "nodes.yaml").write_text(ROOM)
    (tmp_path / "network.yaml").write_text(POLICY)
    app = typer.Typer()
    app.command()(plan)

    def run(model: object, *more: str) -> Result:
        files = ["--nodes", str(tmp_path / "nodes.yaml"), "--network", str(tmp_path / "network.yaml")]
        result = CliRunner().invoke(app, [str(model), *files, *more])
        if isinstance(result.exception, Exception):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    return run


def shards_of(folder: Path, **given) -> Path:
    folder.mkdir()
    (folder / STRUCTURE_FILE).write_bytes(structure(**given).to_json())
    return folder


def test_a_dense_model_is_shown_stage_by_stage(place, tmp_path: Path) -> None:
    topology = json.loads(place(shards_of(tmp_path / "model", num_layers=6), "--json").stdout)

    spans = [(stage["span"]["start"], stage["span"]["end"]) for stage in topology["stages"]]
    assert len(spans) >= 2
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == 6
    assert topology["prediction"]["lamports_per_token"] == 12
    assert topology["prediction"]["tokens_per_s"] > 0


def test_experts_that_go_apart_are_shown_with_their_node(place, tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "model", num_layers=2, moe_layers={1: 8}, layer_bytes=256 * 1024)

    (topology,) = [json.loads(place(folder, "--json").stdout)]
    pieces = [*topology["stages"], *topology["expert_sets"]]
    held = {piece["node_id"]: piece["experts"]["1"] for piece in pieces if piece["experts"].get("1")}
    assert len(held) >= 2
    assert sorted(expert for ids in held.values() for expert in ids) == list(range(8))

    printed = place(folder).stdout
    assert "experts 0" in printed
    assert "tokens/s" in printed
    assert all(name in printed for name in held)


def test_several_pipelines_are_shown_if_there_are_nodes_for_them(place, tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "model", num_layers=2)
    pipelines = json.loads(place(folder, "--json", "--pipelines", "9").stdout)

    assert [len(one["stages"]) for one in pipelines] == [1, 1, 1]
    assert len({one["stages"][0]["node_id"] for one in pipelines}) == 3
    assert place(folder, "--pipelines", "9").stdout.count("tokens/s") == 3


def test_a_model_that_is_not_cut_is_cut_first(place, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "qwen2_moe")
    topology = json.loads(place(source, "--json").stdout)

    (cut,) = (tmp_path / "home" / "shards").glob(f"*/*/{STRUCTURE_FILE}")
    assert topology["model_id"] == str(source)
    assert topology["revision"] == cut.parent.name
    assert topology["stages"][-1]["span"]["end"] == 3


def test_too_little_room_is_an_error_with_the_missing_bytes(place, tmp_path: Path) -> None:
    with pytest.raises(InsufficientCapacity, match=r"\d+ bytes are missing"):
        place(shards_of(tmp_path / "model", num_layers=60))


@pytest.mark.parametrize(
    ("stored", "served", "warned"),
    [("bfloat16", "float16", True), ("float16", "float16", False), ("bfloat16", "bfloat16", False)],
)
def test_a_checkpoint_in_bfloat16_that_is_served_in_float16_is_warned_about(
    place, tmp_path: Path, stored: str, served: str, warned: bool
) -> None:
    source = save_checkpoint(tmp_path / "source", dtype=getattr(torch, stored))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": served}))

    first = place(source, "--json")
    (cut,) = (tmp_path / "home" / "shards").glob(f"*/*/{STRUCTURE_FILE}")
    for result in (first, place(cut.parent, "--json")):
        assert ("numerics_error" in result.stderr) is warned
        json.loads(result.stdout)
