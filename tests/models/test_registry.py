"""A model is described without its weights, cut once for all callers, and read from the registry's disk."""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from azu.errors import (
    AzuError,
    BrokenCheckpoint,
    Forbidden,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    Unavailable,
    UnsupportedModel,
)
from azu.models import registry as registry_module
from azu.models.cut import cut
from azu.models.hub import newest_on_hub
from azu.models.registry import ModelRegistry
from azu.models.sources import model_folder_name
from azu.models.status import ModelState, RedisModelStatus
from azu.protocol.structure import STRUCTURE_FILE
from tests.models.checkpoints import (
    change_config,
    load_checkpoint,
    reassemble,
    save_checkpoint,
    store_checkpoint,
)
from tests.models.hub_stand_in import COMMIT, OLD_COMMIT


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def status(redis_url: str) -> RedisModelStatus:
    return RedisModelStatus(redis_url)


@pytest.fixture
def registry(tmp_path: Path, models: Path, status: RedisModelStatus) -> ModelRegistry:
    return ModelRegistry(tmp_path / "registry", model_roots=[models], status=status, max_model_bytes=10**9)


def on_disk(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def test_describe_returns_what_pricing_needs_and_cuts_nothing(registry, models, status, tmp_path):
    folder = save_checkpoint(models / "moe", "qwen2_moe")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    description = registry.describe(str(folder))
    assert description.model_id == str(folder)
    assert len(description.architecture.layers) == 3
    assert description.files["tokenizer.json"] == b'{"version": "1.0"}'
    assert json.loads(description.files["config.json"])["model_type"] == "qwen2_moe"
    assert registry.describe(str(folder), description.revision) == description
    assert registry.structure(str(folder), description.revision) is None
    assert status.get(str(folder)).state is ModelState.DESCRIBED
    assert not list((tmp_path / "registry").rglob("*.safetensors"))


def test_the_bytes_of_a_new_model_are_known_before_it_is_read(registry, models, tmp_path):
    folder = save_checkpoint(models / "dense")
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert [registry.new_bytes(str(folder)) for _ in range(2)] == [size, size]
    assert list((tmp_path / "registry").iterdir()) == []
    registry.describe(str(folder), None, False)
    assert registry.new_bytes(str(folder)) == size, "a job of long ago was looked at"
    registry.describe(str(folder))
    assert registry.new_bytes(str(folder)) == 0
    assert registry.new_bytes("azu/tiny-dense") == 0
    with pytest.raises(ModelNotFound):
        registry.new_bytes(str(models / "missing"))


def test_a_revision_that_the_network_never_had_is_new_like_a_model(registry, hub, tmp_path):
    repository = save_checkpoint(tmp_path / "repository")
    hub.add("org/model", repository, old=repository)
    registry.describe("org/model", OLD_COMMIT)
    assert registry.describe("org/model", None, False).revision == COMMIT
    size = registry.new_bytes("org/model")
    assert size == newest_on_hub("org/model")[1] > 0, "a job of long ago was looked at"
    registry.describe("org/model")
    assert registry.new_bytes("org/model") == 0
    registry._pins.clear()
    hub.broken = True
    assert registry.new_bytes("org/model") == 0, "what the network has needs no Hub"


def test_of_a_repository_only_the_revisions_stay_that_are_current_or_in_use(registry, hub, tmp_path):
    repository = save_checkpoint(tmp_path / "repository")
    hub.add("org/model", repository, old=repository)

    def cached() -> set[str]:
        folder = Path(constants.HF_HUB_CACHE, "models--org--model", "snapshots")
        return {path.name for path in folder.glob("*") if path.is_dir()}

    registry.describe("org/model", OLD_COMMIT)
    assert cached() == {OLD_COMMIT}
    registry._room = replace(registry._room, free_bytes=2**62)
    with pytest.raises(Unavailable, match="no room"):
        registry.describe("org/model")
    assert registry.describe("org/model", OLD_COMMIT).revision == OLD_COMMIT
    assert cached() == {OLD_COMMIT}
    registry._room = replace(registry._room, free_bytes=0)
    registry._deployed = lambda: {("org/model", OLD_COMMIT)}
    registry.describe("org/model")
    assert cached() == {COMMIT, OLD_COMMIT}
    registry._deployed = frozenset
    registry.describe("org/model", OLD_COMMIT)
    registry.describe("org/model", COMMIT)
    registry._described.clear()
    registry.describe("org/model", OLD_COMMIT)
    assert cached() == {OLD_COMMIT}
    (repository / "config.json").write_text("{}")
    hub.add("org/broken", repository)
    with pytest.raises(AzuError):
        registry.describe("org/broken")
    assert not Path(constants.HF_HUB_CACHE, "models--org--broken").exists(), "it would stay for ever"
    assert cached() == {OLD_COMMIT}, "the other one has the same commits"


def test_a_model_that_left_the_disk_is_new_again_and_one_in_use_stays(registry, models, status):
    folders = [str(save_checkpoint(models / name)) for name in ("one", "two")]
    cut = [(folder, registry.describe(folder).revision) for folder in folders]
    for one in cut:
        registry.ensure_cut(*one)
    registry._room = replace(registry._room, free_bytes=2**62)
    with pytest.raises(Unavailable, match="no room"):
        registry._cut(registry._find(folders[1], None), registry._folder(*cut[1]), None)
    assert registry.structure(*cut[0]) is not None
    total = on_disk(registry._root)
    registry._room = replace(registry._room, free_bytes=0, disk_free=lambda root: total - on_disk(root))
    registry._deployed = lambda: set(cut)
    with pytest.raises(Unavailable, match="no room"), registry._room_for(("a/new", ""), 1):
        pass
    registry._deployed = frozenset
    with registry._room_for(cut[1], 1):
        free = total - on_disk(registry._root)
        with pytest.raises(Unavailable, match="no room"), registry._room_for(("a/new", ""), free):
            pass
    with registry._room_for(cut[1], free):
        pass
    assert registry.structure(*cut[0]) is None
    assert registry.new_bytes(folders[0]) > 0
    assert [one.model_id for one in status.ready()] == [folders[1]]
    assert registry.ensure_cut(*cut[1]) == registry.structure(*cut[1])


def test_a_model_is_cut_once_and_then_read(registry, models, status):
    folder = save_checkpoint(models / "moe", "qwen2_moe")
    key = (str(folder), registry.describe(str(folder)).revision)
    structure = registry.ensure_cut(*key)
    assert registry.structure(*key) == structure
    assert (structure.model_id, structure.revision) == key
    total = sum(shard.weight_bytes for shard in structure.shards)
    found = status.get(str(folder))
    assert (found.state, found.revision, found.done_bytes, found.total_bytes) == (
        ModelState.READY,
        key[1],
        total,
        total,
    )
    for shard in structure.shards:
        content = registry.shard_path(*key, shard.name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard.sha256
        chunks = [
            registry.read_shard(*key, shard.name, start, 1000) for start in range(0, shard.size_bytes, 1000)
        ]
        assert b"".join(chunks) == content
    tensors = reassemble(registry.shard_path(*key, "head").parent, structure)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load_checkpoint(folder).items())


def test_concurrent_callers_cut_once(registry, models, monkeypatch):
    cuts = []
    monkeypatch.setattr(
        registry_module, "cut", lambda *args, **given: cuts.append(args) or cut(*args, **given)
    )
    folder = save_checkpoint(models / "dense")
    with ThreadPoolExecutor(8) as pool:
        revisions = set(pool.map(lambda _: registry.describe(str(folder)).revision, range(8)))
        (revision,) = revisions
        structures = list(pool.map(lambda _: registry.ensure_cut(str(folder), revision), range(8)))
    assert len(cuts) == 1
    assert all(structure == structures[0] for structure in structures)


def test_another_registry_finds_a_model_that_is_cut(registry, models, status, tmp_path):
    folder = save_checkpoint(models / "dense")
    key = (str(folder), registry.describe(str(folder)).revision)
    structure = registry.ensure_cut(*key)
    other = ModelRegistry(tmp_path / "registry", model_roots=[], status=status, max_model_bytes=0)
    assert other.structure(*key) == structure
    assert other.ensure_cut(*key) == structure


def test_a_model_with_a_lost_shard_is_cut_again(registry, models, status, tmp_path):
    folder = save_checkpoint(models / "dense")
    key = (str(folder), registry.describe(str(folder)).revision)
    structure = registry.ensure_cut(*key)
    registry.shard_path(*key, "layer_1_dense").unlink()
    other = ModelRegistry(tmp_path / "registry", model_roots=[models], status=status, max_model_bytes=10**9)
    assert other.structure(*key) is None
    assert other.ensure_cut(*key) == structure
    assert other.shard_path(*key, "layer_1_dense").is_file()


@pytest.mark.parametrize("name", ["layer_9_dense", "../structure.json", "", "embed.safetensors"])
def test_only_a_models_shards_are_read(registry, models, name):
    folder = save_checkpoint(models / "dense")
    key = (str(folder), registry.describe(str(folder)).revision)
    with pytest.raises(NotFound):
        registry.read_shard(*key, "embed", 0, 10)
    registry.ensure_cut(*key)
    with pytest.raises(NotFound):
        registry.read_shard(*key, name, 0, 10)


def test_config_files_of_a_cut_model_stay_when_their_source_changes(registry, models):
    folder = save_checkpoint(models / "dense")
    key = (str(folder), registry.describe(str(folder)).revision)
    config = (folder / "config.json").read_bytes()
    with pytest.raises(NotFound):
        registry.read_file(*key, "config.json")
    registry.ensure_cut(*key)
    change_config(folder, bos_token_id=5)
    assert registry.read_file(*key, "config.json") == config
    for name in ("structure.json", "embed.safetensors", "../x", ""):
        with pytest.raises(NotFound):
            registry.read_file(*key, name)


def test_only_a_limited_number_of_descriptions_is_kept(registry, models, monkeypatch):
    monkeypatch.setattr(registry_module, "_MAX_DESCRIBED", 2)
    folders = [str(save_checkpoint(models / str(index), vocab_size=90 + index)) for index in range(4)]
    first = registry.describe(folders[0])
    for folder in folders:
        registry.describe(folder)
    assert len(registry._described) == 2
    assert registry.describe(folders[0]) == first


@pytest.mark.parametrize("revision", ["main", "..", "../../x", "", "0" * 39, "G" * 40, "0" * 40 + "\n"])
def test_only_a_commit_identifies_a_cut(registry, models, tmp_path, revision):
    for call in (registry.structure, registry.ensure_cut):
        with pytest.raises(InvalidRequest):
            call(str(models / "dense"), revision)
    assert os.listdir(tmp_path / "registry") == []


@pytest.mark.parametrize("asked", ["azu/tiny-dens", "azu/tiny-dense-2"])
def test_the_error_for_an_unknown_model_names_those_that_are_near_and_how_to_see_all(registry, asked):
    with pytest.raises(ModelNotFound, match=r"; nearest: azu/tiny-dense.*\. `azu models` shows all"):
        registry.describe(asked)
    with pytest.raises(ModelNotFound, match=r"'azu/q'\. `azu models` shows all"):
        registry.describe("azu/q")


def test_the_error_for_a_model_that_is_not_offered_names_none_of_those(tmp_path, status):
    registry = ModelRegistry(
        tmp_path / "registry", model_roots=[], status=status, max_model_bytes=1, offered=["azu/tiny-moe"]
    )
    with pytest.raises(Forbidden) as error:
        registry.describe("azu/tiny-dens")
    assert "tiny-dense" not in error.value.message


def test_the_status_of_a_failed_cut_has_the_reason_and_the_cut_is_tried_again(registry, models, status):
    folder = save_checkpoint(models / "dense")
    good = load_checkpoint(folder)
    store_checkpoint(folder, good | {"lm_head.weight": good["lm_head.weight"] * float("nan")})
    revision = registry.describe(str(folder)).revision
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors"):
        registry.ensure_cut(str(folder), revision)
    failed = status.get(str(folder))
    assert failed.state is ModelState.FAILED
    assert "lm_head.weight" in failed.error
    store_checkpoint(folder, good)
    with pytest.raises(ModelNotFound, match="changed"):
        registry.ensure_cut(str(folder), revision)
    registry.ensure_cut(str(folder), registry.describe(str(folder)).revision)
    assert status.get(str(folder)).state is ModelState.READY


def test_a_disk_that_fails_during_a_cut_is_named_by_its_place_under_home(registry, models, status, tmp_path):
    folder = save_checkpoint(models / "dense")
    revision = registry.describe(str(folder)).revision
    out = Path("registry") / model_folder_name(str(folder)) / revision
    (tmp_path / out).parent.mkdir(exist_ok=True)
    (tmp_path / out).write_text("a file where the folder has to be")

    with pytest.raises(Unavailable) as failed:
        registry.ensure_cut(str(folder), revision)

    assert failed.value.message == status.get(str(folder)).error == f"{out}: File exists"


def test_a_model_larger_than_the_networks_limit_is_refused_at_once(models, status, tmp_path):
    folder = save_checkpoint(models / "dense")
    registry = ModelRegistry(tmp_path / "registry", model_roots=[models], status=status, max_model_bytes=1000)
    with pytest.raises(InvalidRequest) as caught:
        registry.describe(str(folder))
    assert (caught.value.param, caught.value.code) == ("model", "model_too_large")


def test_custom_code_is_refused(registry, models):
    folder = save_checkpoint(models / "dense")
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text(f"open({str(models / 'ran')!r}, 'w')")
    with pytest.raises(UnsupportedModel):
        registry.describe(str(folder))
    assert not (models / "ran").exists()


def test_a_folder_that_changes_is_described_again(registry, models):
    folder = save_checkpoint(models / "dense")
    before = registry.describe(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    after = registry.describe(str(folder))
    assert after.revision != before.revision
    assert "tokenizer.json" in after.files


def test_the_weights_of_a_hub_model_are_fetched_only_for_its_cut(registry, hub, models, tmp_path):
    hub.add("org/model", save_checkpoint(tmp_path / "repository", "llama", shard_size="20KB"))
    description = registry.describe("org/model")
    assert description.revision == COMMIT
    assert not any(name.endswith(".safetensors") for name in hub.downloads())
    asked = len(hub.requests)
    assert registry.describe("org/model") is description
    assert len(hub.requests) == asked
    structure = registry.ensure_cut("org/model", COMMIT)
    tensors = reassemble(registry.shard_path("org/model", COMMIT, "head").parent, structure)
    expected = load_checkpoint(tmp_path / "repository")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_a_hub_model_that_is_too_large_is_not_downloaded(hub, models, status, tmp_path):
    hub.add("org/model", save_checkpoint(tmp_path / "repository"))
    registry = ModelRegistry(tmp_path / "registry", model_roots=[models], status=status, max_model_bytes=1000)
    with pytest.raises(InvalidRequest, match="weights"):
        registry.describe("org/model")
    with pytest.raises(InvalidRequest, match="weights"):
        registry.ensure_cut("org/model", COMMIT)
    assert not any(name.endswith(".safetensors") for name in hub.downloads())


_USE = """
import sys
from pathlib import Path
from azu.models.registry import ModelRegistry
from azu.models.status import ModelState, ModelStatus
class Status:
    def put(self, status): pass
    def get(self, model_id): return ModelStatus(model_id, "", ModelState.UNKNOWN)
registry = ModelRegistry(Path(sys.argv[1]), model_roots=[], status=Status(), max_model_bytes=10**9)
description = registry.describe("org/private")
structure = registry.ensure_cut("org/private", description.revision)
print(structure.revision, structure.shards[0].sha256)
"""


@pytest.mark.prove
def test_the_hubs_own_environment_variables_are_used(hub, tmp_path):
    hub.add("org/private", save_checkpoint(tmp_path / "repository"))
    hub.token = "hf_secret"
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_secret",
    }

    def use(root: str, **changes: str) -> str:
        command = [sys.executable, "-c", _USE, str(tmp_path / root)]
        return subprocess.check_output(command, env=environment | changes, text=True, timeout=600)

    online = use("one")
    assert online.startswith(COMMIT)
    assert list((tmp_path / "home").rglob("snapshots/*/config.json"))
    hub.requests.clear()
    assert use("two", HF_HUB_OFFLINE="1") == online
    assert hub.requests == []


@pytest.mark.prove
def test_processes_that_share_a_root_cut_once(hub, tmp_path):
    hub.add("org/private", save_checkpoint(tmp_path / "repository", "qwen2_moe"))
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", _USE, str(tmp_path / "root")]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    printed = {process.communicate(timeout=600)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(printed) == 1
    (structure,) = (tmp_path / "root").rglob(STRUCTURE_FILE)
    written = {path.stat().st_mtime_ns for path in structure.parent.glob("*.safetensors")}
    assert max(written) <= structure.stat().st_mtime_ns


def test_a_model_that_is_not_offered_is_refused_before_a_search(tmp_path, models, status):
    registry = ModelRegistry(
        tmp_path / "registry",
        model_roots=[models],
        status=status,
        max_model_bytes=10**9,
        offered=["azu/tiny-dense", "azu/tiny-m*"],
    )
    assert [model.model_id for model in registry.available()] == ["azu/tiny-dense", "azu/tiny-moe"]
    assert registry.describe("azu/tiny-moe").model_id == "azu/tiny-moe"
    for model_id in ("azu/tiny-dense2", "AZU/tiny-dense", "other/model", str(models / "any"), "*", ""):
        with pytest.raises(Forbidden) as refused:
            registry.describe(model_id)
        assert refused.value.param == "model"
