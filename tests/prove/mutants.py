"""Usage: python -m tests.prove.mutants [--places N] [--seed N]

Changes one place of a pure module at a time and runs the tests of its room, in copies of the tree: a mutant
that they do not notice survives. The places are a seeded sample. Exits 1 when less than 90% are killed.

mutmut and cosmic-ray were not taken: mutmut runs whole packages and has no seeded sample, cosmic-ray changes
the tree it runs in and knows one test command. Both need their own configuration for each room.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[2]
LEAST_KILLED = 0.9
# Why a mutant that survives is no gap: its name, and the reason.
REASONS = Path(__file__).with_name("survivors.toml")
# Files, and the tests that hold them: quick ones first.
TARGETS = {
    "azu/protocol/frame.py": "tests/protocol/test_frame.py",
    "azu/engine/scheduler.py": "tests/engine/test_scheduler.py tests/engine/test_pipeline.py",
    "azu/engine/step_check.py": "tests/engine/test_step_check.py",
    "azu/engine/expert_counts.py": "tests/engine/test_expert_counts.py",
    "azu/cluster/*.py": "tests/cluster tests/actors",
    "azu/planner/*.py": "tests/planner",
    "azu/money/ledger/transfers.py": "tests/money/ledger/test_transfers.py "
    "tests/money/ledger/test_posting.py",
    "azu/money/ledger/posting.py": "tests/money/ledger/test_posting.py tests/money/ledger/test_state.py",
    "azu/money/ledger/state.py": "tests/money/ledger/test_posting.py tests/money/ledger/test_state.py",
}
# A mutant that runs this long is in an endless loop.
TIMEOUT_S = 900
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
    ast.Break: ast.Continue, ast.Continue: ast.Break,
}  # fmt: skip
# Calls whose loss no behaviour shows: lines of logs and figures of metrics.
UNTESTED_CALLS = ("log.", "self._meter.", "meter.")
# No behaviour either: assertions guard against azu's own mistakes, the rest is text and defaults.
SKIPPED_NODES = (ast.Assert, ast.Raise, ast.JoinedStr, ast.arguments)
SKIPPED_FIELDS = ("annotation", "returns", "decorator_list", "bases")


@dataclass(frozen=True, slots=True)
class Mutant:
    """A file with one place changed. Its name stays the same when the lines above it move."""

    name: str
    file: str
    line: int
    source: str


def places(node: ast.AST, owner: str = "", *, in_function: bool = False) -> Iterator[tuple[ast.AST, str]]:
    """Yield the nodes in functions that can be changed, each with its function; always in the same order."""
    if isinstance(node, SKIPPED_NODES):
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        owner = f"{owner}.{node.name}".lstrip(".")
        in_function = not isinstance(node, ast.ClassDef)
    elif in_function and replacement(node) is not None:
        yield node, owner
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in SKIPPED_FIELDS:
                yield from places(child, owner, in_function=in_function)


def replacement(node: ast.AST) -> ast.AST | None:
    """Return what a place is changed to, None if it is left as it is."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            return ast.Compare(node.left, [SWAPS[type(op)]()], node.comparators)
        case ast.BinOp(op=op) if type(op) in SWAPS:
            return ast.BinOp(node.left, SWAPS[type(op)](), node.right)
        case ast.AugAssign(op=op) if type(op) in SWAPS:
            return ast.AugAssign(node.target, SWAPS[type(op)](), node.value)
        case ast.BoolOp(op=op):
            return ast.BoolOp(SWAPS[type(op)](), node.values)
        case ast.Break() | ast.Continue():
            return SWAPS[type(node)]()
        case ast.UnaryOp(op=ast.Not()):
            return node.operand
        case ast.Constant(value=bool()):
            return ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            return ast.Constant(node.value + 1)
        case ast.If(test=ast.Name() | ast.Attribute() | ast.Call()):
            return ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        case ast.IfExp(test=ast.Name() | ast.Attribute() | ast.Call()):
            return ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        case ast.Expr(value=ast.Call(func=func) | ast.Await(value=ast.Call(func=func))):
            return None if ast.unparse(func).startswith(UNTESTED_CALLS) else ast.Pass()
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            return ast.Return(ast.Constant(None))
    return None


def mutant(file: str, number: int) -> Mutant:
    """Return the mutant of one of a file's places."""
    tree = ast.parse((ROOT / file).read_text())
    place, function = list(places(tree))[number]
    changed = replacement(place)
    assert changed is not None, "places() yields only what can be changed"
    texts = [ast.unparse(ast.fix_missing_locations(node)).splitlines()[0] for node in (place, changed)]

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return changed if node is place else self.generic_visit(node)

    source = ast.unparse(ast.fix_missing_locations(Replace().visit(tree)))
    return Mutant(f"{file} {function}: {' -> '.join(texts)}", file, place.lineno, source)


def sample(number: int, seed: int) -> list[Mutant]:
    """Return mutants at random places of the files of TARGETS; the same ones for a seed."""
    every = [
        (str(path.relative_to(ROOT)), at)
        for pattern in TARGETS
        for path in sorted(ROOT.glob(pattern))
        for at in range(len(list(places(ast.parse(path.read_text())))))
    ]
    chosen = random.Random(seed).sample(every, min(number, len(every)))
    print(f"{len(chosen)} of {len(every)} places, seed {seed}", flush=True)
    return [mutant(file, at) for file, at in sorted(chosen)]


def tests_of(file: str) -> list[str]:
    """Return the tests that hold a file."""
    return next(tests for pattern, tests in TARGETS.items() if Path(file).match(pattern)).split()


def new_tree(folder: Path) -> None:
    """Copy what git keeps of this tree."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def fails(tree: Path, tests: list[str]) -> bool:
    """Return whether a test fails in a tree, or does not end."""
    # Other packages' plugins take longer to import than most of these tests take to run.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    marked = ["-m", "not prove and not cluster", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", *marked, *tests]
    try:
        ran = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return True
    if ran.returncode not in (0, 1, 2):
        raise RuntimeError(f"pytest ended with {ran.returncode} on {tests}: {ran.stdout.decode()[-500:]}")
    return ran.returncode != 0


def main() -> int:
    """Print every mutant that survives, with its reason where one is known; exit 1 if too many do."""
    parser = argparse.ArgumentParser(
        description="Change the pure rooms one place at a time and run their tests."
    )
    parser.add_argument("--places", type=int, default=300)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("AZU_TEST_SEED", "1")))
    arguments = parser.parse_args()
    mutants = sample(arguments.places, arguments.seed)
    reasons = tomllib.loads(REASONS.read_text())
    trees: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="azu-mutants-") as folder:
        for worker in range(os.cpu_count() or 1):
            trees.put(Path(folder) / str(worker))
            new_tree(Path(folder) / str(worker))

        for tests in {test for one in mutants for test in tests_of(one.file)}:
            if fails(Path(folder) / "0", [tests]):
                raise RuntimeError(f"{tests} fails without any change")

        def killed(numbered: tuple[int, Mutant]) -> bool:
            number, one = numbered
            tree = trees.get()
            target = tree / one.file
            original = target.read_text()
            try:
                target.write_text(one.source)
                # Python knows a stale .pyc by the time of its source, in whole seconds.
                os.utime(target, (number, number))
                died = fails(tree, tests_of(one.file))
                print("killed  " if died else "SURVIVED", f"{one.name} (line {one.line})", flush=True)
                return died
            finally:
                target.write_text(original)
                os.utime(target, (0, 0))
                trees.put(tree)

        with ThreadPoolExecutor(trees.qsize()) as pool:
            deaths = list(pool.map(killed, enumerate(mutants, 1)))
    survivors = [one for one, died in zip(mutants, deaths, strict=True) if not died]
    for one in survivors:
        print(f"{one.file}:{one.line} {one.name}\n    {reasons.get(one.name, 'no reason is known')}")
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants killed")
    return int(len(survivors) > (1 - LEAST_KILLED) * len(mutants))


if __name__ == "__main__":
    sys.exit(main())
