"""A systemd unit that runs `azu join` at each start of this machine."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from azu.files import CONFIGS, read_text

UNIT = "azu-join"
# What chooses GPUs, programs and users is the service's too; secrets are not written into a unit.
_KEPT = ("CUDA_VISIBLE_DEVICES", "PATH", "AZU_RAY_USER", "AZU_ONE_USER", "AZU_TLS_CA")
_OPERATORS = CONFIGS / "systemd" / "azu-worker.service"
_UNUSUAL = re.compile(r"[^A-Za-z0-9_.-]")
# What the operator's unit says of its own files.
_OWN = ("#", "EnvironmentFile=", "Environment=", "StateDirectory", "ExecStart=")


def unit_text(command: Sequence[str], home: Path, *, of_root: bool) -> str:
    """Return the unit, with the rest of its lines from the operator's unit in configs/systemd.

    `home` is AZU_HOME for the command.
    """
    lines = [line for line in read_text(_OPERATORS).splitlines() if not line.startswith(_OWN)]
    at = lines.index("[Service]") + 1
    started = " ".join(map(_quoted, command))
    kept = {
        "AZU_HOME": str(home.absolute()),
        **{name: os.environ[name] for name in _KEPT if name in os.environ},
    }
    own = [f"Environment={_quoted(f'{name}={value}')}" for name, value in kept.items()]
    own.append(f"ExecStart={started}")
    text = "\n".join([*lines[:at], *own, *lines[at:], ""])
    return text if of_root else text.replace("WantedBy=multi-user.target", "WantedBy=default.target")


def unit_path(name: str | None = None) -> tuple[Path, tuple[str, ...]]:
    """Return where the unit of this user lies, and the commands that start it now and at each boot.

    A `name` gives a unit of its own, for one of several of a machine.
    """
    unit = UNIT if name is None else f"{UNIT}-{_UNUSUAL.sub('-', name)}"
    if os.geteuid() == 0:
        folder, control = Path("/etc/systemd/system"), "systemctl"
        last: tuple[str, ...] = ()
    else:
        configured = os.environ.get("XDG_CONFIG_HOME")
        folder = Path(configured or Path.home() / ".config") / "systemd" / "user"
        control, last = "systemctl --user", ("loginctl enable-linger",)
    return folder / f"{unit}.service", (f"{control} daemon-reload", f"{control} enable --now {unit}", *last)


def _quoted(word: str) -> str:
    """Return a word as systemd reads it: in quotes, without variables and specifiers."""
    for special, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        word = word.replace(special, escaped)
    return f'"{word}"'
