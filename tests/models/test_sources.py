"""A model id leads to a built-in model, to a folder under an allowed root, or to the Hub."""

from pathlib import Path

import pytest

from azu.errors import BrokenCheckpoint, InvalidRequest, ModelNotFound
from azu.models.sources import FolderSource, find_source
from tests.models.hub_stand_in import COMMIT


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An allowed folder with a model, beside a folder that is not allowed."""
    for place in ("models/good", "secret/bad"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "models"


def test_a_folder_under_an_allowed_root_is_a_model(root):
    source = find_source(f"{root}/good", None, [root])
    assert isinstance(source, FolderSource)
    assert (source.folder, source.weight_bytes) == (root / "good", len(b"weights"))


@pytest.mark.parametrize(
    "path",
    [
        "{root}/../secret/bad",
        "{root}/good/../../secret/bad",
        "{secret}/bad",
        "/etc",
        "/",
        "//etc",
        "{root}x/good",
    ],
)
def test_a_path_outside_the_roots_is_refused_before_the_disk_is_touched(root, monkeypatch, path):
    monkeypatch.setattr(Path, "resolve", lambda self: pytest.fail(f"looked at {self}"))
    with pytest.raises(InvalidRequest) as caught:
        find_source(path.format(root=root, secret=root.parent / "secret"), None, [root])
    assert caught.value.param == "model"


def test_no_folder_is_allowed_without_roots(root):
    with pytest.raises(InvalidRequest):
        find_source(f"{root}/good", None, [])


def test_a_link_out_of_the_roots_is_refused(root):
    (root / "link").symlink_to("../secret/bad")
    with pytest.raises(InvalidRequest, match="leads out"):
        find_source(f"{root}/link", None, [root])


def test_a_root_may_itself_be_a_link(root):
    (root.parent / "alias").symlink_to(root)
    assert find_source(f"{root.parent}/alias/good", None, [root.parent / "alias"]).folder == root / "good"


def test_a_missing_folder_is_not_found(root):
    for name in ("nothing", "good/config.json"):
        with pytest.raises(ModelNotFound):
            find_source(f"{root}/{name}", None, [root])


def test_a_folder_with_a_weight_file_that_links_outside_is_refused(root):
    (root / "good" / "model.safetensors").unlink()
    (root / "good" / "model.safetensors").symlink_to("../../secret/bad/model.safetensors")
    with pytest.raises(BrokenCheckpoint, match="leads outside"):
        find_source(f"{root}/good", None, [root])


@pytest.mark.parametrize(
    "model_id", ["azu/unknown", "azu/", "azu/..", "azu/../tiny-dense", "azu/Tiny", "azu/a/b"]
)
def test_an_unknown_built_in_model_is_not_found(hub, model_id):
    with pytest.raises(ModelNotFound):
        find_source(model_id, None, [])
    assert hub.requests == []


@pytest.mark.parametrize("model_id", ["azu/tiny-dense", "azu/tiny-moe"])
def test_built_in_models_come_with_the_package(hub, model_id):
    source = find_source(model_id, None, [])
    assert (source.folder / "config.json").is_file()
    assert 0 < source.weight_bytes < 4 * 1024**2
    assert hub.requests == []


def test_any_other_id_is_a_repository_on_the_hub(hub, root):
    hub.add("org/model", root / "good")
    assert find_source("org/model", None, [root]).revision == COMMIT


@pytest.mark.parametrize(
    "model_id", ["", "x" * 513, "a\0b", "/a\0b", "a\nb", "\x1b[31m", "../x", "~/x", "./x", "file:///etc"]
)
def test_a_malformed_id_is_refused(hub, tmp_path, model_id):
    with pytest.raises(InvalidRequest) as caught:
        find_source(model_id, None, [Path("/a")])
    assert caught.value.param == "model"
    assert hub.requests == []
    assert not (tmp_path / "hub_cache").exists()


@pytest.mark.parametrize(
    "revision",
    [
        "",
        "..",
        "../../x",
        "refs/../../x",
        "/etc",
        "a//b",
        "a b",
        "-x",
        "a/.",
        "x" * 513,
        "a\0b",
        "main\n",
        "é",
    ],
)
def test_a_revision_that_could_leave_its_folder_is_refused(hub, root, tmp_path, revision):
    hub.add("org/model", root / "good")
    with pytest.raises(InvalidRequest) as caught:
        find_source("org/model", revision, [])
    assert caught.value.param == "revision"
    assert hub.requests == []
    assert not (tmp_path / "hub_cache").exists()


def test_a_folders_revision_changes_only_with_its_content(root):
    source = find_source(f"{root}/good", None, [root])
    (root / "good" / "README.md").write_text("hello")
    (root / "good" / "config.json").touch()
    assert find_source(f"{root}/good", None, [root]) == source
    (root / "good" / "model.safetensors").write_bytes(b"WEIGHTS")
    changed = find_source(f"{root}/good", None, [root])
    assert changed.revision != source.revision
    assert find_source(f"{root}/good", changed.revision, [root]) == changed
    with pytest.raises(ModelNotFound, match="changed"):
        find_source(f"{root}/good", source.revision, [root])


def test_the_same_content_has_the_same_revision_elsewhere(root):
    same = root / "same"
    same.mkdir()
    for path in (root / "good").iterdir():
        (same / path.name).write_bytes(path.read_bytes())
    assert find_source(f"{same}", None, [root]).revision == find_source(f"{root}/good", None, [root]).revision
