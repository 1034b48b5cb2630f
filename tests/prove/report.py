"""What the parts showed, kept from run to run: a part that is not run again keeps what it showed before."""

import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from tests.prove.parts import Part

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "tests" / "REPORT.md"
SHOWN = ROOT / "tests" / "REPORT.json"
# The whole output of each part's last run, which shows why one failed.
OUTPUTS = Path(tempfile.gettempdir()) / "azu-prove"
PART_TIMEOUT_S = 3600
TIMED_OUT = 124
QUOTED_LINES = 14


@dataclass(frozen=True, slots=True)
class Shown:
    """What a part's command printed last, how it ended, and on what."""

    exit_status: int
    seconds: int
    tail: str
    date: str
    commit: str
    seed: int


def run(part: Part, seed: int) -> Shown:
    """Run a part's command to its end."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            part.command,
            cwd=ROOT,
            env=os.environ | {"AZU_TEST_SEED": str(seed)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PART_TIMEOUT_S,
            check=False,
        )
        exit_status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        exit_status, output = TIMED_OUT, (error.stdout or b"").decode(errors="replace")
    OUTPUTS.mkdir(exist_ok=True)
    (OUTPUTS / f"{part.name.replace('/', '-')}.log").write_text(output)
    tail = "\n".join(output.strip().splitlines()[-QUOTED_LINES:]).replace(str(ROOT), ".")
    seconds = round(time.monotonic() - started)
    return Shown(exit_status, seconds, tail, time.strftime("%Y-%m-%d"), commit(), seed)


def commit() -> str:
    """Return the short hash of what is checked out, marked when other files than the report differ."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=False)

    told = git("rev-parse", "--short", "HEAD").stdout.strip() or "unknown"
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":(exclude)tests/REPORT.*").returncode
    return f"{told}-dirty" if changed else told


def read_shown() -> dict[str, Shown]:
    """Return what was shown before, by the part's name."""
    if not SHOWN.exists():
        return {}
    return {name: Shown(**fields) for name, fields in json.loads(SHOWN.read_text()).items()}


def write_report(parts: tuple[Part, ...], shown: Mapping[str, Shown]) -> None:
    """Write what every part last showed."""
    known = {part.name: shown[part.name] for part in parts if part.name in shown}
    SHOWN.write_text(json.dumps({name: asdict(one) for name, one in known.items()}, indent=1) + "\n")
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "transformers", "redis"))
    lines = [
        "# What `make prove` showed",
        "",
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {versions}.",
        "",
        "| part | shows | result | seconds | date, commit, seed |",
        "|---|---|---|---|---|",
    ]
    for part in parts:
        one = known.get(part.name)
        if one is None:
            lines.append(f"| {part.name} | {part.shows} | not run | | |")
            continue
        result = "passed" if one.exit_status == 0 else f"**exit {one.exit_status}**"
        when = f"{one.date}, {one.commit}, {one.seed}"
        lines.append(f"| {part.name} | {part.shows} | {result} | {one.seconds} | {when} |")
    for name, one in known.items():
        lines += ["", f"## {name}", "", "```", one.tail, "```"]
    REPORT.write_text("\n".join(lines) + "\n")
