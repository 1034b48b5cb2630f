"""Models on the Hub: only the needed files are downloaded, once, and errors say what is wrong."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from azu.errors import BrokenCheckpoint, InvalidRequest, ModelNotFound, Unavailable
from azu.models import hub as hub_module
from azu.models.hub import find_on_hub, forget, newest_on_hub
from tests.models.hub_stand_in import COMMIT, OLD_COMMIT, HubStandIn

WEIGHTS = b"w" * 3_000_000


WEIGHT_BYTES = len(WEIGHTS) + len("model.safetensors")


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A usual repository, with more files than azu may download."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "README.md", "modeling_evil.py"):
        (folder / name).write_text(json.dumps(name))
    for name in ("model.safetensors", "other.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(WEIGHTS + name.encode())
    return folder


def test_only_config_and_tokenizer_are_fetched_before_the_weights(hub, folder):
    hub.add("org/model", folder)
    source = find_on_hub("org/model", None)
    assert source.revision == COMMIT
    assert source.weight_bytes == WEIGHT_BYTES
    assert hub.downloads() == {"config.json", "tokenizer.json"}
    assert {path.name for path in source.folder.iterdir()} == {"config.json", "tokenizer.json"}


def test_the_size_of_a_repository_is_known_by_its_listing_and_a_forgotten_one_leaves_the_cache(hub, folder):
    hub.add("org/model", folder)
    wanted = sum((folder / name).stat().st_size for name in ("config.json", "tokenizer.json"))
    assert newest_on_hub("org/model") == (COMMIT, wanted + WEIGHT_BYTES)
    assert hub.downloads() == set()
    weights = find_on_hub("org/model", None).weights(quiet)
    forget("org/other")
    assert (weights / "model.safetensors").exists()
    forget("org/model")
    assert not weights.exists()


def test_the_size_of_a_repository_that_the_hub_does_not_list_is_not_guessed(hub, folder, monkeypatch):
    hub.add("org/model", folder)
    monkeypatch.setattr(hub_module, "_listing", lambda *_: None)
    with pytest.raises(Unavailable, match="how large"):
        newest_on_hub("org/model")


def test_the_weights_are_fetched_later_and_only_once(hub, folder):
    hub.add("org/model", folder)
    source = find_on_hub("org/model", None)
    hub.requests.clear()
    reports: list[tuple[int, int]] = []
    weights = source.weights(lambda done, total: reports.append((done, total)))
    assert hub.downloads() == {"model.safetensors"}
    assert (weights / "model.safetensors").read_bytes() == WEIGHTS + b"model.safetensors"
    assert reports[-1] == (WEIGHT_BYTES, WEIGHT_BYTES)
    assert all(0 < done <= total == WEIGHT_BYTES for done, total in reports)
    hub.requests.clear()
    source.weights(quiet)
    assert hub.downloads() == set()


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("keep", [-1, None])
def test_a_file_that_is_not_as_the_hub_lists_it_is_fetched_once_more(hub, folder, name, keep):
    right = (folder / name).read_bytes()
    wrong = right[:keep] if keep else bytes(reversed(right))
    hub.add("org/model", folder)
    hub.damaged[name] = [wrong]

    weights = find_on_hub("org/model", None).weights(quiet)

    assert (weights / name).read_bytes() == right
    assert hub.damaged[name] == []


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("keep", [-1, None])
def test_a_file_that_stays_damaged_is_refused_by_its_name(hub, folder, name, keep):
    right = (folder / name).read_bytes()
    hub.add("org/model", folder)
    hub.damaged[name] = [right[:keep] if keep else bytes(reversed(right))] * 20

    with pytest.raises(BrokenCheckpoint, match=name):
        find_on_hub("org/model", None).weights(quiet)


def test_the_files_of_an_indexed_checkpoint_are_those_in_its_index(hub, folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "other.safetensors"}})
    )
    hub.add("org/model", folder)
    source = find_on_hub("org/model", None)
    assert source.weight_bytes == 2 * len(WEIGHTS) + len("model.safetensors") + len("other.safetensors")
    assert hub.downloads() == {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    source.weights(quiet)
    assert hub.downloads() >= {"model-1.safetensors", "other.safetensors"}


def test_a_branch_or_tag_is_pinned_to_its_commit(hub, folder, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text('{"old": true}')
    (old / "model.safetensors").write_bytes(b"old")
    hub.add("org/model", folder, old=old)
    source = find_on_hub("org/model", "v1")
    assert source.revision == OLD_COMMIT
    assert (source.folder / "config.json").read_text() == '{"old": true}'
    assert find_on_hub("org/model", OLD_COMMIT) == source


@pytest.mark.parametrize("revision", ["unknown", "3" * 40])
def test_an_unknown_revision_is_not_found(hub, folder, revision):
    hub.add("org/model", folder)
    with pytest.raises(ModelNotFound):
        find_on_hub("org/model", revision)


def test_an_unknown_model_is_not_found(hub):
    with pytest.raises(ModelNotFound, match="missing/model") as caught:
        find_on_hub("missing/model", None)
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    "model_id",
    [
        "../../etc",
        "a/b/c",
        "a//b",
        "..",
        "a/..",
        "",
        "a b",
        "a--b",
        "x" * 97,
        "a/b.git",
        "https://x/y",
        "é/x",
    ],
)
def test_an_id_that_no_repository_can_have_is_refused_without_a_request(hub, tmp_path, model_id):
    with pytest.raises(InvalidRequest) as caught:
        find_on_hub(model_id, None)
    assert caught.value.param == "model"
    assert hub.requests == []
    assert not (tmp_path / "hub_cache").exists()


def test_the_token_is_sent_and_a_private_model_is_not_found_without_it(hub, folder, monkeypatch):
    hub.add("org/private", folder)
    hub.token = "hf_secret"
    with pytest.raises(ModelNotFound):
        find_on_hub("org/private", None)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert find_on_hub("org/private", None).revision == COMMIT


def test_the_error_for_a_gated_model_says_that_the_token_has_no_access(hub, folder):
    hub.add("org/gated", folder)
    hub.gated.add("org/gated")
    with pytest.raises(ModelNotFound, match="gated"):
        find_on_hub("org/gated", None)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_repository_without_config_or_safetensors_is_refused_before_a_payment(hub, folder, missing):
    (folder / missing).unlink()
    hub.add("org/model", folder)
    with pytest.raises(BrokenCheckpoint):
        find_on_hub("org/model", None)
    assert hub.downloads() == set()


@pytest.mark.parametrize(
    "target", ["model-9.safetensors", "../../x.safetensors", "*.safetensors", "model.bin"]
)
def test_an_index_with_missing_files_is_refused_without_a_download_of_weights(hub, folder, target):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": target}}))
    hub.add("org/model", folder)
    with pytest.raises(BrokenCheckpoint, match=r"index\.json"):
        find_on_hub("org/model", None)
    assert hub.downloads() == {"config.json", "tokenizer.json", "model.safetensors.index.json"}


def test_a_tokenizer_that_is_too_large_is_not_downloaded(hub, folder, monkeypatch):
    monkeypatch.setattr(hub_module, "MAX_DESCRIPTION_BYTES", 1000)
    (folder / "tokenizer.json").write_bytes(b"x" * 1001)
    hub.add("org/model", folder)
    with pytest.raises(BrokenCheckpoint, match="tokenizer"):
        find_on_hub("org/model", None)
    assert hub.downloads() == set()


def cached(hub: HubStandIn, folder: Path) -> None:
    hub.add("org/model", folder)
    find_on_hub("org/model", None).weights(quiet)
    hub.requests.clear()


def test_a_cached_model_is_found_offline(hub, folder, monkeypatch):
    cached(hub, folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = find_on_hub("org/model", None)
    assert (source.revision, source.weight_bytes) == (COMMIT, WEIGHT_BYTES)
    assert (source.weights(quiet) / "model.safetensors").read_bytes() == WEIGHTS + b"model.safetensors"
    assert hub.requests == []


def test_an_unknown_model_is_not_found_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        find_on_hub("org/model", None)
    assert hub.requests == []


def test_a_cached_model_is_found_when_the_hub_is_down(hub, folder, monkeypatch):
    cached(hub, folder)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    source = find_on_hub("org/model", None)
    assert (source.weights(quiet) / "model.safetensors").read_bytes() == WEIGHTS + b"model.safetensors"


def test_a_failing_hub_is_unavailable_and_the_model_not_missing(hub):
    hub.broken = True
    with pytest.raises(Unavailable):
        find_on_hub("org/model", None)


def test_a_hub_that_does_not_answer_is_unavailable(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unavailable):
        find_on_hub("org/model", None)


def test_weights_that_are_not_in_the_cache_are_not_found_offline(hub, folder, monkeypatch):
    hub.add("org/model", folder)
    source = find_on_hub("org/model", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises((ModelNotFound, Unavailable)):
        source.weights(quiet)
