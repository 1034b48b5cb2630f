"""No model id leads to a file outside the allowed folders: no file there is opened."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from azu.errors import AzuError
from azu.models.sources import find_source
from tests.models.hostile_ids import hostile_ids
from tests.models.questions import built_in_folder

# On the way to an allowed folder, only the names of the folders above it may be looked up.
TRACED = """
import os, sys
from pathlib import Path
from azu.errors import AzuError
from azu.models.sources import find_source
from tests.models.hostile_ids import hostile_ids
root, outside = Path(sys.argv[1]), Path(sys.argv[2])
def ask(model_id):
    try:
        find_source(model_id, None, [root])
    except AzuError as error:
        return error.status
    return 200
ask(str(root / "good")), ask("azu/tiny-dense"), ask("a/b")
ids = [one for one in hostile_ids(root, outside) if "\\0" not in one]
os.path.exists("/azu-begins-here")
answers = [ask(model_id) for model_id in ids]
os.path.exists("/azu-ends-here")
assert len(ids) >= 200 - 20 and all(400 <= status < 500 for status in answers), answers
print(len(ids))
"""


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """An allowed folder with links in it, and a good model outside."""
    root, outside = tmp_path / "models", tmp_path / "outside"
    shutil.copytree(built_in_folder("azu/tiny-dense"), outside)
    shutil.copytree(outside, root / "good")
    (root / "link").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    (root / "file").write_text("no folder")
    return root, outside


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_two_hundred_hostile_ids_are_refused_and_a_good_one_is_not(folders: tuple[Path, Path]) -> None:
    root, outside = folders
    ids = hostile_ids(root, outside)
    assert len(set(ids)) >= 200
    found = []

    for model_id in ids:
        try:
            found.append(find_source(model_id, None, [root]).folder)
        except AzuError as error:
            assert 400 <= error.status < 500, (model_id, error)  # noqa: PT017
            assert error.param == "model", (model_id, error)  # noqa: PT017

    assert found == []
    assert find_source(str(root / "good"), None, [root]).folder == root / "good"


@pytest.mark.prove
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_no_file_outside_is_opened_for_any_of_them(folders: tuple[Path, Path], tmp_path: Path) -> None:
    root, outside = folders
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-e", "trace=%file,getdents64", "-s", "4096", "-o", str(trace)]
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "HOME": "/nowhere",
    }
    done = subprocess.run(
        [*command, sys.executable, "-c", TRACED, str(root), str(outside)],
        env=environment, capture_output=True, text=True, timeout=500, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    lines = trace.read_text(errors="replace").splitlines()
    begin = next(n for n, line in enumerate(lines) if '"/azu-begins-here"' in line)
    end = next(n for n, line in enumerate(lines) if '"/azu-ends-here"' in line)
    during = lines[begin + 1 : end]
    opened = [line for line in during if "open" in line.split("(")[0] and "ENOENT" not in line]
    strangers = [
        line
        for line in opened
        if f'"{root}' not in line and str(tmp_path / "hub") not in line and sys.prefix not in line
    ]
    print(
        f"{done.stdout.strip()} hostile ids: {len(during)} calls on paths, "
        f"{len(opened)} files or folders opened, {len(strangers)} of them outside"
    )
    assert strangers == []
    assert not [line for line in opened if "/outside" in line or "passwd" in line]
