"""Other Unix users that run parts of a network: found, created, and what their processes get."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from azu.errors import ConfigurationError

_TIMEOUT_S = 30.0

# What a process of another user keeps of the environment: the rest may hold the operator's secrets, or name
# folders that the user cannot read.
_KEPT = frozenset(
    {
        "GLIBC_TUNABLES", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "PATH", "SSL_CERT_DIR",
        "SCHEDULER_PRIVATE_KEY", "SSL_CERT_FILE", "TZ", "all_proxy", "http_proxy", "https_proxy", "no_proxy",
        "ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    }
)  # fmt: skip
_KEPT_PREFIXES = (
    "AZU_", "CUDA_", "HF_", "HYPERLIQUID_", "LC_", "NCCL_", "NVIDIA_", "PYTHON", "RAY_", "REDIS_", "TORCH",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class UnixUser:
    """A user of this machine; `groups` are its other groups."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: Path

    @classmethod
    def find(cls, name: str) -> Self | None:
        """Return the user of a name; None if there is none."""
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            return None
        groups = tuple(group for group in os.getgrouplist(name, found.pw_gid) if group != found.pw_gid)
        return cls(name, found.pw_uid, found.pw_gid, groups, Path(found.pw_dir))

    @classmethod
    def found_or_created(cls, name: str) -> Self:
        """Return the user of a name, created as a system user without a login where it is missing.

        Raises ConfigurationError where it cannot be created.
        """
        if (found := cls.find(name)) is not None:
            return found
        useradd = shutil.which("useradd", path=f"{os.defpath}:/usr/sbin:/sbin")
        if useradd is None:
            raise ConfigurationError(f"there is no user {name}, and this machine has no useradd to create it")
        options = ("--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent")
        done = subprocess.run(
            (useradd, *options, "--shell", "/usr/sbin/nologin", name),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        # Two networks may create it at once: the later one finds it.
        if (found := cls.find(name)) is None:
            raise ConfigurationError(f"the user {name} cannot be created: {done.stderr.strip()}")
        return found

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a process of this user that `variables` were meant for."""
        kept = {
            name: value
            for name, value in variables.items()
            if name in _KEPT or name.startswith(_KEPT_PREFIXES)
        }
        return kept | {"HOME": str(self.home), "USER": self.name, "LOGNAME": self.name}

    def popen_options(self) -> dict[str, Any]:
        """Return the options with which `subprocess` starts a process as this user."""
        return {
            # The user may be unable to read the folder that this process is in.
            "cwd": "/",
            "user": self.uid,
            "group": self.gid,
            "extra_groups": self.groups,
            "umask": 0o077,
        }
