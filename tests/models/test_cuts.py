"""A model that is cut slowly keeps its thread, and no caller."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from azu.errors import Unavailable
from azu.models.cut import process_lock
from azu.models.cuts import Cuts
from azu.models.registry import ModelRegistry
from azu.models.sources import model_folder_name
from azu.models.status import ModelState, RedisModelStatus
from azu.protocol.structure import Structure
from tests.models.checkpoints import save_checkpoint


@pytest.fixture
def status(redis_url: str) -> RedisModelStatus:
    return RedisModelStatus(redis_url)


@pytest.fixture
def registry(tmp_path: Path, status: RedisModelStatus) -> ModelRegistry:
    roots = [tmp_path / "models"]
    return ModelRegistry(tmp_path / "registry", model_roots=roots, status=status, max_model_bytes=10**9)


def cut_in_the_end(cuts: Cuts, model_id: str, revision: str) -> Structure:
    for _ in range(600):
        if (structure := cuts.ensure(model_id, revision)) is not None:
            return structure
        time.sleep(0.05)
    raise AssertionError("it was not cut")


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_slow_cuts_keep_no_caller_and_no_other_model(registry: ModelRegistry, tmp_path: Path) -> None:
    slow, other = (str(save_checkpoint(tmp_path / "models" / name)) for name in ("slow", "other"))
    revision = registry.describe(slow).revision
    folder = tmp_path / "registry" / model_folder_name(slow) / revision
    cuts = Cuts(registry)
    # Another process cuts it.
    with process_lock(folder.with_name(f"{folder.name}.lock"), timeout_s=1, busy="busy"):
        # More callers than there are threads.
        assert [cuts.ensure(slow, revision) for _ in range(20)] == [None] * 20
        assert cut_in_the_end(cuts, other, registry.describe(other).revision).num_layers
        assert registry.structure(slow, revision) is None
    assert cut_in_the_end(cuts, slow, revision) == registry.structure(slow, revision)


def uncuttable(registry: ModelRegistry, folder: Path) -> tuple[str, str, Path]:
    """Save a model; return its id and revision, and the file where the folder of its cut has to be."""
    model_id = str(save_checkpoint(folder / "models" / "dense"))
    revision = registry.describe(model_id).revision
    in_the_way = folder / "registry" / model_folder_name(model_id) / revision
    in_the_way.write_text("")
    return model_id, revision, in_the_way


def test_an_error_is_told_to_a_caller_that_waits_and_a_later_caller_starts_anew(
    registry: ModelRegistry, status: RedisModelStatus, tmp_path: Path
) -> None:
    model_id, revision, in_the_way = uncuttable(registry, tmp_path)
    now_s = 0.0
    cuts = Cuts(registry, lambda: now_s)
    with pytest.raises(Unavailable):
        cut_in_the_end(cuts, model_id, revision)

    assert cuts.ensure(model_id, revision) is None, "it is tried again"
    status.remove(model_id)
    until(lambda: status.get(model_id).state is ModelState.FAILED)
    in_the_way.unlink()
    now_s = 60.0
    assert cut_in_the_end(cuts, model_id, revision), "no caller waited for that error"


def test_a_cut_that_no_caller_asks_for_any_more_is_forgotten(registry: ModelRegistry, tmp_path: Path) -> None:
    one, other = (str(save_checkpoint(tmp_path / "models" / name)) for name in ("one", "other"))
    revision = registry.describe(one).revision
    now_s = 0.0
    cuts = Cuts(registry, lambda: now_s)
    assert cuts.ensure(one, revision) is None
    until(lambda: cuts._cuts[one, revision][0].done())

    now_s = 60.0
    revision = registry.describe(other).revision
    assert cuts.ensure(other, revision) is None
    assert [model for model, _ in cuts._cuts] == [other]
    assert cut_in_the_end(cuts, other, revision)


def test_a_cut_that_failed_unseen_is_begun_again(
    registry: ModelRegistry, status: RedisModelStatus, tmp_path: Path
) -> None:
    model_id, revision, in_the_way = uncuttable(registry, tmp_path)
    cuts = Cuts(registry)
    cuts.start(model_id, revision)
    until(lambda: status.get(model_id).state is ModelState.FAILED)
    until(lambda: cuts._cuts[model_id, revision][0].done())
    in_the_way.unlink()

    cuts.start(model_id, revision)
    until(lambda: status.get(model_id).state is ModelState.READY)
