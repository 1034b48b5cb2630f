"""A systemd unit that runs `azu join` at each start of this machine."""

import os
from collections.abc import Sequence
from pathlib import Path

from azu.files import CONFIGS, read_text

UNIT = "azu-join"
_OPERATORS = CONFIGS / "systemd" / "azu-worker.service"
# What the operator's unit says of its own files.
_OWN = ("#", "EnvironmentFile=", "Environment=", "StateDirectory", "ExecStart=")


def unit_text(command: Sequence[str], home: Path, *, of_root: bool) -> str:
    """Return the unit, with the rest of its lines from the operator's unit in configs/systemd.

    `home` is AZU_HOME for the command.
    """
    lines = [line for line in read_text(_OPERATORS).splitlines() if not line.startswith(_OWN)]
    at = lines.index("[Service]") + 1
    started = " ".join(map(_quoted, command))
    own = [f"Environment={_quoted(f'AZU_HOME={home.absolute()}')}", f"ExecStart={started}"]
    text = "\n".join([*lines[:at], *own, *lines[at:], ""])
    return text if of_root else text.replace("WantedBy=multi-user.target", "WantedBy=default.target")


def unit_path() -> tuple[Path, tuple[str, ...]]:
    """Return where the unit of this user lies, and the commands that start it now and at each boot."""
    if os.geteuid() == 0:
        folder, control = Path("/etc/systemd/system"), "systemctl"
        last: tuple[str, ...] = ()
    else:
        configured = os.environ.get("XDG_CONFIG_HOME")
        folder = Path(configured or Path.home() / ".config") / "systemd" / "user"
        control, last = "systemctl --user", ("loginctl enable-linger",)
    return folder / f"{UNIT}.service", (f"{control} daemon-reload", f"{control} enable --now {UNIT}", *last)


def _quoted(word: str) -> str:
    """Return a word as systemd reads it: in quotes, without variables and specifiers."""
    for special, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        word = word.replace(special, escaped)
    return f'"{word}"'
