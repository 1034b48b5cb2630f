"""`make prove`: everything that takes longer than `make test` may, and the report the README quotes.

Usage: python -m tests.prove [--seed N] [--only WORD ...] [--list]

Each part is a command; its exit status decides, its last lines are quoted. The seed reaches the tests as
AZU_TEST_SEED. tests/REPORT.md is written after every part, so that a run that is cut off says how far it
came; parts that were not run again keep what they showed before, with the commit that showed it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "tests" / "REPORT.md"
SHOWN = ROOT / "tests" / "REPORT.json"
PART_TIMEOUT_S = 3600
TIMED_OUT = 124
QUOTED_LINES = 40


@dataclass(frozen=True, slots=True)
class Part:
    """A command and what it shows."""

    name: str
    shows: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Shown:
    """What a part's command printed last, how it ended, and on what."""

    exit_status: int
    seconds: int
    tail: str
    date: str
    commit: str
    seed: int


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
    Part(
        "demo leaves nothing",
        "no process, port or file is left at its end or after Ctrl-C; it runs again at once",
        pytest("tests/cli/test_demo.py", "-m", "prove"),
    ),
    Part(
        "up, join, leave, down",
        "a network from the command line, with nothing left behind",
        pytest("tests/cli/test_up.py", "-m", "prove"),
    ),
    Part(
        "money: rules in Redis",
        "the Redis adapter answers as the pure rules do; kill -9 under load loses no acknowledged transfer",
        pytest("tests/ledger/test_same_answers.py", "tests/ledger/test_durability.py", "-m", "prove"),
    ),
    Part(
        "money: crash points",
        "treasury and settling process killed before and after every write and send, 20 seeds each",
        pytest(
            "tests/treasury/test_crash_points.py", "tests/lifecycle/test_settling_process.py", "-m", "prove"
        ),
    ),
    Part(
        "money: claims",
        "1,000 copies of one claim credit once, 1,000 bad claims credit nothing",
        pytest("tests/treasury/test_claims.py", "-m", "prove"),
    ),
    Part(
        "money: submits",
        "1,000 submits at once against a balance for 10 jobs start exactly 10, through the real ingress",
        pytest("tests/cluster/test_submits.py"),
    ),
    Part(
        "money: payouts",
        "50 workers, every devnet fault at random, 20 seeds: each is paid exactly once",
        pytest("tests/treasury/test_payouts_on_devnet.py", "-m", "prove"),
    ),
    Part(
        "money: soak",
        "8 clients do all at random for 10 minutes while who keeps their money dies; the audit is clean",
        pytest("tests/cluster/test_soak.py"),
    ),
    Part(
        "page",
        "chat with cost, network and receipts in Chromium at 1280 and 400 pixels, by key and keyboard",
        pytest("tests/cluster/test_page.py", "-m", "prove"),
    ),
    Part(
        "metrics",
        "every Grafana panel has data in a Prometheus, from Ray's agents and from the ingress",
        pytest("tests/cluster/test_grafana.py", "-m", "prove", "-s"),
    ),
    Part(
        "logs",
        "one job followed by its ids through every process; no key, token or password in any log",
        pytest("tests/cluster/test_logs.py", "-m", "prove"),
    ),
    Part(
        "azu top",
        "a live picture and one sample of a network at work",
        pytest("tests/cluster/test_top.py", "-m", "prove", "-s"),
    ),
    Part(
        "kill matrix",
        "each piece killed in prefill, at the first, a middle and the last token, several at once: "
        "4 streams go on, identical and charged as undisturbed",
        pytest("tests/cluster/test_kill_matrix.py", "-m", "prove", "-s"),
    ),
    Part(
        "node loss",
        "each whole node killed, each piece and node frozen and woken: 4 streams go on, identical",
        pytest("tests/cluster/test_node_loss.py", "-m", "prove", "-s"),
    ),
    Part(
        "host cut off",
        "three hosts, the link of one down for 30 s: 4 streams go on, identical",
        pytest("tests/cluster/test_host_cut_off.py", "-m", "prove", "-s"),
    ),
    Part(
        "control plane",
        "registry, scheduler, pipelines, ingress and treasury killed 5 times each under 4 clients: "
        "every job done, right and charged once, and nobody who holds weights starts again",
        pytest("tests/cluster/test_control_plane.py", "-m", "prove", "-s"),
    ),
    Part(
        "memory and leaving",
        "a node loses half its memory under 8 streams, another leaves: every stream goes on, identical",
        pytest("tests/cluster/test_change.py", "-m", "prove", "-s"),
    ),
    Part(
        "nobody fits",
        "jobs without workers wait, go on when a node joins, else end with their reason and a release",
        pytest("tests/cluster/test_nobody_fits.py", "-m", "prove", "-s"),
    ),
    Part(
        "random kills",
        "60 kills in 15 minutes with 8 clients: every job identical, books clean",
        pytest("tests/cluster/test_random_kills.py", "-m", "prove", "-s"),
    ),
    Part(
        "fuzz: mutations",
        "82,000 good requests with something in them changed: no 5xx, no money moved by a refused one",
        ("env", "AZU_TEST_FUZZ_REQUESTS=82000", *pytest("tests/deployments/test_fuzz.py", "-s")),
    ),
    Part(
        "fuzz: schema",
        "schemathesis over the OpenAPI schema, 18,000 requests and more: no 5xx, answers as the schema says",
        ("env", "AZU_TEST_SCHEMA_EXAMPLES=750", *pytest("tests/deployments/test_schema.py", "-s")),
    ),
    Part(
        "hostile models",
        "206 hostile ids open no file outside the allowed folders; 20 hostile checkpoints refused by name",
        pytest("tests/registry/test_hostile_ids.py", "tests/deployments/test_hostile_checkpoints.py", "-s"),
    ),
    Part(
        "clients of others",
        "LangChain's OpenAI classes work unchanged",
        pytest("tests/deployments/test_langchain.py", "-s"),
    ),
    Part(
        "damaged files",
        "nodes, network, ticket, receipt, keystore, credentials and structure files: read or refused by name",
        ("env", "AZU_TEST_FILE_MUTANTS=600", *pytest("tests/cli/test_hostile_files.py")),
    ),
    Part(
        "families",
        "every family in 3 uneven stages, every MoE family with experts over 3 holders: as transformers",
        pytest("tests/engine/test_check.py", "-s"),
    ),
    Part(
        "forms of checkpoints",
        "per-expert, fused, tied and prefix-less names in three dtypes: as transformers",
        pytest("tests/engine/test_input_forms.py"),
    ),
    Part(
        "what cannot be cut",
        "native types that are refused before anything is loaded, each with its reason",
        pytest("tests/architecture/test_inspection.py", "-s"),
    ),
    Part(
        "engine over the cluster",
        "six families over nodes too small for one; 24 requests at once as if alone; 100 dropped streams",
        pytest(
            "tests/cluster/test_families.py",
            "tests/cluster/test_crowd.py",
            "tests/cluster/test_cancel.py",
            "-s",
        ),
    ),
    Part("bench", "azu beside transformers, cp and Redis in one run", azu("bench")),
    Part(
        "ray up",
        "machines reached by SSH: up, a paid prompt, down; serve deploy; nodes that come when asked for",
        pytest("tests/test_ray_up.py", "-s"),
    ),
    Part(
        "newcomer's walk",
        "the README's commands, from up to down: who lends earns what the prompt cost, to the lamport",
        pytest("tests/cli/test_walk.py", "-s"),
    ),
    Part(
        "containers",
        "the steps of the container files run in a clean directory",
        pytest("tests/test_containers.py", "-m", "prove", "-s"),
    ),
    Part(
        "encryption: on the wire",
        "three hosts answer 100 requests: a capture on their bridge finds every hidden state and the tokens "
        "with TLS off, none with TLS on",
        pytest("-s", "tests/hosts/test_encryption.py", "tests/hosts/test_namespaces.py"),
    ),
    Part(
        "encryption: who joins",
        "no node with a wrong or missing certificate or token, with a ticket used up or revoked",
        pytest("-s", "tests/hosts/test_joining.py"),
    ),
    Part(
        "encryption: its cost",
        "a frame's way between two nodes with TLS, beside the same without",
        azu("bench", "--only", "tls", "--json"),
    ),
    Part(
        "damaged frames",
        "10,000 frames damaged in flight: each refused, its sender named, every job's output as undisturbed",
        pytest("-s", "tests/engine/test_corrupted_frames.py", "-m", "prove"),
    ),
)


def the_rest() -> Part:
    """Return the part of every test marked `prove` that no other part runs."""
    named = {word for part in PARTS for word in part.command if word.startswith("tests/")}
    left_out = [f"--ignore={word.split('::')[0]}" for word in sorted(named)]
    return Part("long tests", "every other test marked `prove`", pytest("-m", "prove", *left_out))


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
    tail = "\n".join(output.strip().splitlines()[-QUOTED_LINES:]).replace(str(ROOT), ".")
    seconds = round(time.monotonic() - started)
    return Shown(exit_status, seconds, tail, time.strftime("%Y-%m-%d"), commit(), seed)


def commit() -> str:
    """Return the short hash of what is checked out, marked when files differ from it."""
    told = subprocess.run(
        ("git", "describe", "--always", "--dirty", "--exclude=*"),
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return told.stdout.strip() or "unknown"


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


def main() -> int:
    """Run the parts in order; exit 0 only if all passed."""
    parser = argparse.ArgumentParser(description="Run what takes longer than `make test`.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only", nargs="*", default=[], help="run the parts whose name has one of these words"
    )
    parser.add_argument("--list", action="store_true", help="print the parts' names and run nothing")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    parts = (*PARTS, the_rest())
    wanted = [
        part for part in parts if not arguments.only or any(word in part.name for word in arguments.only)
    ]
    if arguments.list:
        for part in wanted:
            console.print(f"{part.name} [dim]{part.shows}[/]")
        return 0
    shown = read_shown()
    for part in wanted:
        with console.status(part.name):
            shown[part.name] = run(part, arguments.seed)
        one = shown[part.name]
        mark = "[green]✓[/]" if one.exit_status == 0 else "[red]✗[/]"
        console.print(f"{mark} {part.name} [dim]{one.seconds} s[/]")
        write_report(parts, shown)
    return int(any(shown[part.name].exit_status for part in wanted))


if __name__ == "__main__":
    sys.exit(main())
