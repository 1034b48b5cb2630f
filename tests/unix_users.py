"""Other Unix users for tests, and an interpreter that they can run."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from azu.launch.unix_users import UnixUser

# The names of the users that a network of the tests runs as.
MONEY = "azu-test-money"
RAY = "azu-test-ray"
_CLONE_NEWNS = 0x00020000
_TIMEOUT_S = 20.0


def second_user() -> UnixUser:
    """Return a user without rights; skips the test where this process cannot start processes of it."""
    if os.geteuid() != 0:
        pytest.skip("only root starts processes of another user")
    if (user := UnixUser.find("daemon")) is None:
        pytest.skip("this machine has no user daemon")
    return user


@contextmanager
def users_of_tests(folder: Path) -> Iterator[None]:
    """Have MONEY and RAY created where a network needs them, and remove them; `folder` is an empty one.

    Skips the test where this process cannot create or use them.
    """
    second_user()
    if shutil.which("useradd") is None:
        pytest.skip("this machine has no useradd")
    share_interpreter(folder)
    try:
        yield
    finally:
        for name in (MONEY, RAY):
            if UnixUser.find(name) is not None:
                subprocess.run(("userdel", name), check=True, timeout=_TIMEOUT_S)


def as_user(user: UnixUser | None, *command: str) -> int:
    """Run a command as a user, and return its exit status."""
    assert user is not None
    done = subprocess.run(
        command,
        env=user.environment(os.environ),
        capture_output=True,
        timeout=_TIMEOUT_S,
        check=False,
        **user.popen_options(),
    )
    return done.returncode


def share_interpreter(folder: Path) -> None:
    """Let other users run this Python although it lies in a home that only its owner enters.

    This process and its children get a view of the file system of their own, in which that home may be passed
    through. Skips the test where the kernel does not allow that.
    """
    closed = [path for path in Path(sys.base_prefix).resolve().parents if not path.stat().st_mode & 0o001]
    if not closed:
        return
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
        pytest.skip(f"other users cannot run the Python in {sys.base_prefix}")
    _mount("--make-rprivate", "/")
    _mount("-t", "tmpfs", "none", str(folder))
    for index, path in enumerate(reversed(closed)):
        upper, work = folder / f"upper-{index}", folder / f"work-{index}"
        upper.mkdir()
        work.mkdir()
        _mount(
            "-t", "overlay", "overlay", "-o", f"lowerdir={path},upperdir={upper},workdir={work}", str(path)
        )
        path.chmod(0o711)


def _mount(*arguments: str) -> None:
    done = subprocess.run(
        ("mount", *arguments), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"other users cannot run the Python in {sys.base_prefix}: {done.stderr.strip()}")
