"""Which Unix user runs which part of a network, and where their homes are.

Any member of a Ray cluster can run code in all of Ray's processes on the head. As a user of their own they
write neither azu's code nor what the processes of money keep, and read none of it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from azu.config import Settings
from azu.config.settings import USERS_LINK
from azu.errors import ConfigurationError, Conflict
from azu.launch.unix_users import UnixUser

# What belongs to the user of money; it moves there from AZU_HOME when the users are separated.
LEDGER = ("redis", "ledger")
DEVNET_CHAIN = "devnet.jsonl"
BESIDE_LEDGER = (
    "signer.json",
    "receipt-key.json",
    "platforms.json",
    "books",
    "devnet.key",
    "devnet-admin.key",
    DEVNET_CHAIN,
)
_MONEY = (*LEDGER, *BESIDE_LEDGER, "signer-calls.json", "books.json", "devnet.json")
# What belongs to the user of Ray, wherever it was before.
_JOBS = "redis-jobs"
_PROBE_TIMEOUT_S = 60.0
# Run as a user: what of azu's code it could change, and what it cannot read of the paths in the arguments.
_PROBE = """
import json, os, sys, importlib.util
import azu.config
folders = {sys.prefix, sys.base_prefix, sys.executable, *filter(None, sys.path)}
for name in ("azu", "actors", "deployments", "ray"):
    folders |= set(importlib.util.find_spec(name).submodule_search_locations)
print(json.dumps({
    "written": sorted(path for path in folders if os.access(path, os.W_OK)),
    "unread": [path for path in sys.argv[1:] if not os.access(path, os.R_OK)],
}))
"""
_PORT_LIMIT = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
# Some systems open them only to the members of a group.
_GPU_DEVICES = ("nvidia*", "kfd", "dri/renderD*")


@dataclass(frozen=True, slots=True)
class NetworkUsers:
    """The users of a network's processes; where one is None it is the user of this process.

    `homes` has the homes of the others, None where one user runs everything, for the reason `why_one`.
    """

    home: Path
    homes: Path | None = None
    money: UnixUser | None = None
    ray: UnixUser | None = None
    why_one: str = ""

    @property
    def money_home(self) -> Path:
        """AZU_HOME of the books, the treasury and the signer."""
        return self.home if self.homes is None else self.homes / "money"

    @property
    def ray_home(self) -> Path:
        """AZU_HOME of Ray's processes."""
        return self.home if self.homes is None else self.homes / "ray" / "home"

    @property
    def jobs_home(self) -> Path:
        """The folder of the Redis of jobs, in which Ray's user can replace nothing that root writes into."""
        return self.home if self.homes is None else self.homes / "ray"

    @property
    def ray_sessions(self) -> Path:
        """The folder of Ray's sessions."""
        return self.home / "ray" if self.homes is None else self.homes / "ray" / "sessions"

    def for_ray(self, path: Path) -> Path:
        """Return a file that Ray's processes can read: a copy, or where they can already the file itself."""
        return path if self.ray is None else self.text_for_ray(path.name, path.read_text())

    def text_for_ray(self, name: str, text: str) -> Path:
        """Write a file that the user of Ray's processes can read and not change; returns its path."""
        assert self.homes is not None
        assert self.ray is not None
        return shared_file(self.homes / "ray" / "files", name, text, self.ray)


def network_users(settings: Settings, *, others_join: bool) -> NetworkUsers:
    """Return the users that a network is to run as, created where they are missing.

    Users are separated where root starts a network that other machines can join, and stay so: the money
    belongs to its user from then on. Raises ConfigurationError or Conflict where that cannot be kept.
    """
    linked = (settings.home / USERS_LINK).is_symlink()
    if not (others_join or linked):
        return NetworkUsers(settings.home, why_one="no other machine can join")
    try:
        if settings.one_user:
            raise ConfigurationError("AZU_ONE_USER is set")
        if os.geteuid() != 0:
            raise ConfigurationError("only root can start processes of other users")
        return _separate(settings)
    except ConfigurationError as error:
        if linked:
            where = f"the money of this network has a user of its own, in {settings.money_home}"
            raise ConfigurationError(f"{where}: {error.message}") from error
        return NetworkUsers(settings.home, why_one=error.message)


def ray_user(settings: Settings, readable: Iterable[Path] = ()) -> UnixUser:
    """Return the user that runs Ray's processes, with AZU_HOME as its home; it reads the paths `readable`.

    Raises ConfigurationError where it can change azu's code, or cannot read it.
    """
    user = UnixUser.found_or_created(settings.ray_user)
    _probe(user, readable)
    folder = _homes(settings) / "ray"
    _own(folder, 0, user.gid, 0o750)
    for name in ("home", "sessions"):
        _own(folder / name, user.uid, user.gid, 0o700)
    return replace(user, home=folder / "home", groups=tuple({*user.groups, *_gpu_groups()}))


def _separate(settings: Settings) -> NetworkUsers:
    if 0 < settings.http_port < int(_PORT_LIMIT.read_text()):
        raise ConfigurationError(f"only root can listen at port {settings.http_port}, see {_PORT_LIMIT}")
    authorities = [path for path in (settings.redis_ca,) if path is not None]
    money = UnixUser.found_or_created(settings.money_user)
    key = os.environ.get("AZU_PRIVATE_KEY_FILE") if settings.chain_url else None
    _probe(money, [*authorities, *([Path(key)] if key else [])])
    ray = ray_user(settings, [*authorities, *settings.model_roots])
    if money.uid == ray.uid or 0 in (money.uid, ray.uid):
        raise ConfigurationError("AZU_MONEY_USER and AZU_RAY_USER have to be two users without root's rights")
    homes = _homes(settings)
    home = homes / "money"
    _own(home, money.uid, money.gid, 0o700)
    for name in _MONEY:
        _move(settings.home / name, home / name, money)
    for before in (settings.home, home):
        _move(before / _JOBS, homes / "ray" / _JOBS, ray)
    _own(homes / "ray" / _JOBS, ray.uid, ray.gid, 0o700)
    link = settings.home / USERS_LINK
    if not link.is_symlink():
        link.symlink_to(homes)
    return NetworkUsers(settings.home, homes, replace(money, home=home), ray)


def _homes(settings: Settings) -> Path:
    """Return the folder for the homes of this AZU_HOME's users; only root changes what is in it."""
    name = hashlib.sha256(str(settings.home.resolve()).encode()).hexdigest()[:12]
    for folder in (settings.user_homes, settings.user_homes / name):
        _own(folder, 0, 0, 0o755)
    return settings.user_homes / name


def _own(folder: Path, uid: int, gid: int, mode: int) -> None:
    """Make a folder in one that only root can change, or correct the owner of one that is there."""
    folder.mkdir(mode=0o700, exist_ok=True, parents=True)
    os.chown(folder, uid, gid, follow_symlinks=False)
    folder.chmod(mode)


def shared_file(folder: Path, name: str, text: str, user: UnixUser) -> Path:
    """Write a file in a folder of such files that a user can read and not change; returns its path."""
    _own(folder, 0, user.gid, 0o750)
    part, path = folder / f".{name}.part", folder / name
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        os.fchown(file.fileno(), 0, user.gid)
        os.fchmod(file.fileno(), 0o640)
        file.write(text)
    part.rename(path)
    return path


def _move(source: Path, target: Path, user: UnixUser) -> None:
    """Move a file or folder into a user's home, perhaps on another disk; it is whole there or not at all."""
    if not source.exists():
        return
    if target.exists():
        raise Conflict(f"{source} and {target} both exist; remove the one that does not count")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, part)
    else:
        shutil.copy2(source, part)
    for path in (part, *part.rglob("*")):
        # The user may have put a link here once the folder is its own.
        os.chown(path, user.uid, user.gid, follow_symlinks=False)
    os.sync()
    part.rename(target)
    # Named so that nothing finds it: from here on the copy counts.
    gone = source.rename(source.with_name(f".{source.name}.moved"))
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()


def _probe(user: UnixUser, readable: Iterable[Path]) -> None:
    try:
        done = subprocess.run(
            (sys.executable, "-P", "-c", _PROBE, *(str(path) for path in readable)),
            env=user.environment(os.environ),
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
            **user.popen_options(),
        )
    except PermissionError as error:
        raise ConfigurationError(
            f"the user {user.name} cannot run azu with {sys.executable}: {error.strerror}"
        ) from error
    if done.returncode != 0:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise ConfigurationError(f"the user {user.name} cannot run azu with {sys.executable}: {reason}")
    found = json.loads(done.stdout)
    if found["written"]:
        raise ConfigurationError(
            f"the user {user.name} could change azu's code: {', '.join(found['written'])}"
        )
    if found["unread"]:
        raise ConfigurationError(f"the user {user.name} cannot read {', '.join(found['unread'])}")


def _gpu_groups() -> set[int]:
    devices = [path.stat() for pattern in _GPU_DEVICES for path in Path("/dev").glob(pattern)]
    return {found.st_gid for found in devices if found.st_mode & 0o006 != 0o006 and found.st_gid != 0}
