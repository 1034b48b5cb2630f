"""The lock file has, with a hash, a release of each package that azu needs, within azu's own bounds."""

import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.lock import LEFT_OUT, LOCKS, ROOT

LINE = re.compile(r"([a-z0-9.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")


def locked(extra: str) -> dict[str, str]:
    lines = [line for line in LOCKS[extra].read_text().splitlines() if not line.startswith("#")]
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found)
    return {one[1]: one[2] for one in found if one}


@pytest.mark.parametrize("extra", LOCKS)
def test_every_dependency_is_locked_within_its_bounds(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, versions = project["optional-dependencies"], locked(extra)
    wanted = map(Requirement, {*project["dependencies"], *extras["node"], *extras[extra]})

    for one in wanted:
        name = canonicalize_name(one.name)
        if name not in LEFT_OUT:
            assert one.specifier.contains(versions[name], prereleases=True), one


def test_images_install_what_is_locked_and_torch_within_azus_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = (one for one in project["optional-dependencies"]["node"] if one.startswith("torch"))
    for file in (ROOT / "configs").glob("*.Dockerfile"):
        text = file.read_text()
        assert f'"{torch}"' in text
        assert f"--require-hashes --no-deps -r {LOCKS['node'].relative_to(ROOT)}" in text


def test_an_image_and_a_developer_get_the_same_releases() -> None:
    node, dev = locked("node"), locked("dev")

    assert node.items() <= dev.items()


@pytest.mark.prove
@pytest.mark.parametrize("extra", LOCKS)
def test_pip_finds_what_is_locked(extra: str) -> None:
    options = ("--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--require-hashes")
    done = subprocess.run(
        (sys.executable, "-m", "pip", "install", *options, "-r", str(LOCKS[extra])),
        capture_output=True,
        text=True,
        timeout=500,
    )

    assert done.returncode == 0, done.stderr
