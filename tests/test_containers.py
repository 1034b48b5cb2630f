"""The container files name what exists, and their steps run in a clean directory, without an engine."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.Dockerfile"))
KNOWN = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "EXPOSE", "ENTRYPOINT", "CMD"}
HOME = "/home/ray"
STEP_TIMEOUT_S = 800


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction of a container file."""

    word: str
    rest: str


def steps(file: Path) -> list[Step]:
    """Return the instructions of a container file, comments left out and continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [Step(*line.split(maxsplit=1)) for line in joined]


def only(file: Path, word: str) -> str:
    """Return the text of the one instruction of a kind."""
    (found,) = [step.rest for step in steps(file) if step.word == word]
    return found


def sources(step: Step) -> list[str]:
    """Return the arguments of a COPY, the target last."""
    return [word for word in step.rest.split() if not word.startswith("--")]


def test_there_is_one_for_the_head_and_one_for_a_worker() -> None:
    assert [file.name for file in FILES] == ["cuda.Dockerfile", "head.Dockerfile"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_has_only_known_instructions_and_copies_only_what_exists(file: Path) -> None:
    assert {step.word for step in steps(file)} <= KNOWN
    copied = {name for step in steps(file) if step.word == "COPY" for name in sources(step)[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    # The whole product is copied.
    assert {"azu", "actors", "deployments", "configs", "pyproject.toml"} <= copied


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_builds_on_the_image_that_the_cluster_uses(file: Path) -> None:
    images = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["docker"]
    kind = "head" if file.name.startswith("head") else "worker"
    assert only(file, "FROM") == images[f"{kind}_image"]
    assert f":{ray.__version__}-" in only(file, "FROM")


def test_the_heads_other_users_can_read_python_and_its_volumes_get_their_owner() -> None:
    (file,) = [one for one in FILES if one.name == "head.Dockerfile"]
    made = [step.rest for step in steps(file) if step.word == "RUN"]
    assert any('chmod 755 "$HOME"' in one for one in made), "the image's home is closed to others"
    services = yaml.safe_load((ROOT / "configs" / "compose.yaml").read_text())["services"]
    homes = [volume.partition(":/home/ray/")[2] for volume in services["money"]["volumes"]]
    for home in homes:
        assert any(f'mkdir -p "$HOME/{home}' in one for one in made), (
            "a volume without a folder belongs to root"
        )


def steps_as_root(file: Path) -> list[str]:
    """Return the commands that a file runs as root."""
    found, user = [], ""
    for step in steps(file):
        user = step.rest if step.word == "USER" else user
        found += [step.rest] if step.word == "RUN" and user == "root" else []
    return found


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="only root makes users")
def test_the_users_of_the_head_have_the_same_numbers_in_every_image(tmp_path: Path) -> None:
    (file,) = [one for one in FILES if one.name == "head.Dockerfile"]
    etc = tmp_path / "etc"
    shutil.copytree("/etc", etc, symlinks=True)
    for name in ("passwd", "group", "shadow", "gshadow"):
        lines = (etc / name).read_text().splitlines(keepends=True)
        (etc / name).write_text("".join(line for line in lines if not line.startswith("azu-")))
    shown = """
from azu.config import Settings
from azu.launch.unix_users import UnixUser
of = Settings.from_environment()
for name in (of.money_user, of.ray_user):
    user = UnixUser.found_or_created(name)
    print(user.uid, user.gid)
"""
    commands = [f"mount --bind {etc} /etc", *steps_as_root(file), '"$0" -c "$1"']
    run_alone = ("unshare", "--mount", "sh", "-ec", "\n".join(commands), sys.executable, shown)
    done = subprocess.run(run_alone, capture_output=True, text=True, timeout=60, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no users can be made here: {done.stderr}")

    assert done.stdout.split() == ["10001", "10001", "10002", "10002"], done.stderr


@pytest.mark.prove
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_steps_run_in_a_clean_directory(file: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    environment = {
        "PATH": f"{tmp_path}/venv/bin:{os.defpath}",
        "HOME": str(tmp_path) + HOME,
        # The machine's own package index is used, as a container would use its own.
        **{name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "https_"))},
    }
    folder = tmp_path
    for step in steps(file):
        if step.word == "WORKDIR":
            folder = Path(str(tmp_path) + step.rest)
            folder.mkdir(parents=True)
        elif step.word == "ARG":
            name, _, value = step.rest.partition("=")
            environment[name] = json.loads(value)
        elif step.word == "COPY":
            copy(sources(step), folder)
        elif step.word == "RUN" and step.rest not in steps_as_root(file):
            run(["bash", "-c", step.rest], folder, environment)

    entry = json.loads(only(file, "ENTRYPOINT"))
    command = json.loads(only(file, "CMD"))
    shown = run([*entry, command[0], "--help"], tmp_path, environment)
    assert re.search(rf"azu {command[0]}", shown)
    # Installed, not found in the folder that the test runs in.
    where = run(["python", "-c", "import azu; print(azu.__file__)"], tmp_path, environment)
    assert where.startswith(str(tmp_path / "venv"))
    print(f"\n{file.name}: every step ran in {time.monotonic() - began:.0f} s")


def copy(words: list[str], folder: Path) -> None:
    """Copy as COPY does: a folder's content goes into the target, a file into the target folder."""
    *names, target = words
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / target)


def run(command: list[str], folder: Path, environment: Mapping[str, str]) -> str:
    """Run a command of the container and return what it printed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=STEP_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
