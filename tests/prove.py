"""`make prove`: everything that takes longer than `make test` may, and the report the README quotes.

Usage: python -m tests.prove [--seed N] [--only WORD ...]

Each part is a command; its exit status decides, its last lines are quoted. The seed reaches the tests as
AZU_TEST_SEED. The report is tests/REPORT.md, written after every part, so that a run that is cut off says
how far it came.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "tests" / "REPORT.md"
PART_TIMEOUT_S = 3600
QUOTED_LINES = 14


@dataclass(frozen=True, slots=True)
class Part:
    """A command and what it shows."""

    name: str
    shows: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Shown:
    """What a part's command printed and how it ended."""

    part: Part
    exit_status: int
    seconds: float
    tail: str


def azu(*arguments: str) -> tuple[str, ...]:
    """Return the command line of an azu command in this environment."""
    return (str(Path(sys.executable).with_name("azu")), *arguments)


def pytest(*arguments: str) -> tuple[str, ...]:
    """Return the command line of a pytest run in this environment."""
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


PARTS = (
    *(
        Part(
            f"check {model} in {stages} stages",
            "tokens and logits stage by stage equal transformers'",
            azu("check", f"azu/{model}", "--stages", str(stages), "--json"),
        )
        for model in ("tiny-dense", "tiny-moe")
        for stages in (1, 2, 3, 6)
    ),
    Part(
        "check tiny-moe, experts apart",
        "experts spread over three holders equal the whole model",
        azu("check", "azu/tiny-moe", "--stages", "3", "--experts-apart", "3", "--json"),
    ),
    Part("demo", "a paid prompt through real stages, for a dense and a MoE model", azu("demo", "--json")),
    Part("long tests", "every test marked `prove`", pytest("-m", "prove")),
)


def run(part: Part, seed: int) -> Shown:
    """Run a part's command to its end."""
    environment = os.environ | {"AZU_TEST_SEED": str(seed)}
    started = time.monotonic()
    done = subprocess.run(
        part.command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PART_TIMEOUT_S,
        check=False,
    )
    tail = "\n".join(done.stdout.strip().splitlines()[-QUOTED_LINES:])
    return Shown(part, done.returncode, time.monotonic() - started, tail)


def write_report(shown: list[Shown], seed: int) -> None:
    """Write the report of the parts so far."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "transformers", "redis"))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    lines = [
        "# What `make prove` showed",
        "",
        f"{time.strftime('%Y-%m-%d')}, {machine}, {versions}, seed {seed}.",
        "",
        "| part | shows | result | seconds |",
        "|---|---|---|---|",
    ]
    for one in shown:
        result = "passed" if one.exit_status == 0 else f"**exit {one.exit_status}**"
        lines.append(f"| {one.part.name} | {one.part.shows} | {result} | {one.seconds:.0f} |")
    for one in shown:
        lines += ["", f"## {one.part.name}", "", "```", one.tail.replace(str(ROOT), "."), "```"]
    REPORT.write_text("\n".join(lines) + "\n")


def main() -> int:
    """Run the parts in order; exit 0 only if all passed."""
    parser = argparse.ArgumentParser(description="Run what takes longer than `make test`.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only", nargs="*", default=[], help="run the parts whose name has one of these words"
    )
    arguments = parser.parse_args()
    console = Console()
    shown: list[Shown] = []
    for part in PARTS:
        if arguments.only and not any(word in part.name for word in arguments.only):
            continue
        with console.status(part.name):
            shown.append(run(part, arguments.seed))
        mark = "[green]✓[/]" if shown[-1].exit_status == 0 else "[red]✗[/]"
        console.print(f"{mark} {part.name} [dim]{shown[-1].seconds:.0f} s[/]")
        write_report(shown, arguments.seed)
    return int(any(one.exit_status for one in shown))


if __name__ == "__main__":
    sys.exit(main())
