import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from azu.cli.shard import shard
from azu.errors import BrokenCheckpoint, InvalidRequest
from azu.protocol.structure import STRUCTURE_FILE, Structure
from tests.models.checkpoints import load_checkpoint, reassemble, save_checkpoint


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AZU_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(shard)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, Exception):
        raise result.exception
    return result


def test_a_folder_is_cut_into_the_given_folder(tmp_path, home):
    source = save_checkpoint(tmp_path / "source", "qwen2_moe")
    facts = json.loads(run(source, "--out", tmp_path / "out", "--json").stdout)
    structure = Structure.from_json((tmp_path / "out" / STRUCTURE_FILE).read_bytes())
    assert facts["model"] == structure.model_id == str(source)
    assert facts["revision"] == structure.revision
    assert facts["folder"] == str(tmp_path / "out")
    assert (facts["num_layers"], facts["dtype"], facts["tied_head"]) == (3, "float32", False)
    assert {one["name"]: one["sha256"] for one in facts["shards"]} == {
        one.name: one.sha256 for one in structure.shards
    }
    tensors = reassemble(tmp_path / "out", structure)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load_checkpoint(source).items())
    assert not home.exists()


def test_shards_go_under_the_home_folder_otherwise(tmp_path, home, monkeypatch):
    save_checkpoint(tmp_path / "source", "gpt2")
    monkeypatch.chdir(tmp_path)
    printed = run("source").stdout
    (structure,) = (home / "shards").glob(f"*/*/{STRUCTURE_FILE}")
    assert structure.parent.name in printed
    assert "GPT2LMHeadModel" in printed


def test_a_broken_checkpoint_is_refused(tmp_path, home):
    source = save_checkpoint(tmp_path / "source")
    (source / "model.safetensors").write_bytes(b"PK\x03\x04")
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors"):
        run(source, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_is_refused(home):
    with pytest.raises(InvalidRequest):
        run("/nowhere/at/all")
