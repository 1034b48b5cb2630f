"""Other Unix users that run parts of a network, and what their processes get of the environment."""

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

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

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a process of this user that `variables` were meant for."""
        kept = {
            name: value
            for name, value in variables.items()
            if name in _KEPT or name.startswith(_KEPT_PREFIXES)
        }
        return kept | {"HOME": str(self.home), "USER": self.name, "LOGNAME": self.name}
