"""A tree of azu in figures: `make house`, or `python -m tests.house [TREE ...]`.

Each tree is a checkout and becomes a column. A checkout from before this file works too:
`git worktree add /tmp/before COMMIT && make house BEFORE=/tmp/before`.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("azu", "actors", "deployments")
# Spelt so that this file is not found itself.
WORDS = re.compile(
    r"\bwho(?:m?)ever\b|\b(?:no|some)body\b|\bsome[o]ne\b|\bnone\s+who\b|\bthat\s+is\s+to\b", re.I
)
TEXTS = (".py", ".md", ".yaml", ".toml", ".lua", ".js", ".html", ".css", ".sh", ".jinja", "file")
WAY_FILES = 8
# Protocols with one implementation in the product, and why each is one nevertheless.
WITH_REASON = {
    "Chain": "a second payment chain is written against it, and its tests hold for every chain",
    "DeploymentBackend": "the state machine's tests put a cluster without Ray behind it",
}

_OPERATIONS = """
import ast, pathlib, sys
from importlib import import_module
from fastapi import FastAPI
api = FastAPI()
for path in sorted(pathlib.Path("deployments").glob("*.py")):
    if "APIRouter(" in path.read_text():
        api.include_router(import_module(f"deployments.{path.stem}").router)
for path, methods in api.openapi()["paths"].items():
    for method, operation in methods.items():
        success = [body for status, body in operation["responses"].items() if status.startswith("2")]
        contents = [content for body in success for content in body.get("content", {}).items()]
        typed = all("$ref" in str(content) or "json" not in kind for kind, content in contents)
        print("typed" if typed else "untyped", method.upper(), path)
"""


@dataclass(frozen=True)
class Tree:
    """A checkout of azu."""

    root: Path

    @cached_property
    def sources(self) -> dict[str, str]:
        """The product's Python files by module name."""
        found = {}
        for folder in FOLDERS:
            for path in sorted((self.root / folder).rglob("*.py")):
                parts = path.relative_to(self.root).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = path.read_text()
        return found

    @cached_property
    def modules(self) -> dict[str, ast.Module]:
        """The same, parsed."""
        return {name: ast.parse(source) for name, source in self.sources.items()}

    @cached_property
    def classes(self) -> list[tuple[str, ast.ClassDef]]:
        """Every class with its module."""
        return [
            (name, node)
            for name, module in self.modules.items()
            for node in ast.walk(module)
            if isinstance(node, ast.ClassDef)
        ]

    @property
    def lines(self) -> dict[str, int]:
        """Lines by module."""
        return {name: source.count("\n") for name, source in self.sources.items()}

    def classes_named_twice(self) -> list[str]:
        """Return class names that more than one class has."""
        names = Counter(node.name for _, node in self.classes)
        return sorted(name for name, times in names.items() if times > 1)

    def words(self) -> list[str]:
        """Return each forbidden word with its place, in every text that git keeps."""
        found = []
        kept = subprocess.run(
            ["git", "-C", self.root, "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for name in sorted(filter(None, kept.split("\0"))):
            path = self.root / name
            if not name.endswith(TEXTS) or not path.is_file():
                continue
            # Names count, and a sentence may go on in the next line of a comment.
            text = re.sub(r"\n\s*(?:#|--|//)\s", "\n", f"{name}\n{path.read_text()}".replace("_", " "))
            found += [f"{name}: {' '.join(match[0].split())}" for match in WORDS.finditer(text)]
        return found

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """The product's modules that each module imports, wherever in the file."""
        return {name: set(self._imports(name, module)) - {name} for name, module in self.modules.items()}

    def _imports(self, importer: str, module: ast.Module) -> Iterator[str]:
        for node in ast.walk(module):
            if isinstance(node, ast.Import):
                named = [(alias.name, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                named = [(f"{node.module}.{alias.name}", str(node.module)) for alias in node.names]
            else:
                continue
            yield from (one for names in named if (one := next(filter(self.modules.get, names), None)))

    def circles(self) -> list[str]:
        """Return the sets of modules that import each other, over any number of steps."""
        reached = {name: self._reached(name) for name in self.imports}
        circles = {
            frozenset(other for other in reached[name] if name in reached[other])
            for name in reached
            if name in reached[name]
        }
        return sorted(" <-> ".join(sorted(circle)) for circle in circles)

    def _reached(self, name: str) -> set[str]:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            new = self.imports[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    def upward(self) -> list[str]:
        """Return the imports against the tree's own floors, those that its contract lets pass included."""
        contracts = tomllib.loads((self.root / "pyproject.toml").read_text())["tool"]["importlinter"][
            "contracts"
        ]
        layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
        floors = {room.strip(): -number for number, layer in enumerate(layers) for room in layer.split("|")}

        def room_of(name: str) -> str | None:
            return next((room for room in floors if f"{name}.".startswith(f"{room}.")), None)

        found = []
        for importer, imported in self.imports.items():
            for other in sorted(imported):
                here, there = room_of(importer), room_of(other)
                if here and there and here != there and floors[there] >= floors[here]:
                    found.append(f"{importer} -> {other}")
        return found

    def protocols(self) -> dict[str, list[str]]:
        """Return each Protocol with the classes that have all its members, as far as names tell."""
        members = {node.name: _members(node) for _, node in self.classes}
        bases = {
            node.name: [ast.unparse(base).split("[")[0] for base in node.bases] for _, node in self.classes
        }

        def all_members(name: str) -> set[str]:
            inherited = (all_members(base) for base in bases.get(name, ()) if base != name)
            return members.get(name, set()).union(*inherited)

        protocols = sorted(name for name in bases if "Protocol" in bases[name])
        return {
            protocol: sorted(
                name for name in members.keys() - protocols if all_members(protocol) <= all_members(name)
            )
            for protocol in protocols
        }

    @cached_property
    def operations(self) -> tuple[list[str], list[str]]:
        """HTTP operations whose success has a typed body, and those whose success has not."""
        ran = subprocess.run(
            [sys.executable, "-c", _OPERATIONS],
            cwd=self.root, env={**os.environ, "PYTHONPATH": str(self.root)}, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        lines = [line.split(" ", 1) for line in ran.stdout.splitlines()]
        return tuple([what for kind, what in lines if kind == wanted] for wanted in ("typed", "untyped"))

    def ways(self) -> list[list[str]]:
        """Return the files that each numbered list of docs/architecture.md's "The three ways" begins with."""
        page = self.root / "docs" / "architecture.md"
        text = page.read_text() if page.exists() else ""
        section = re.search(r"^## The three ways$(.*?)(?=^## |\Z)", text, re.M | re.S)
        ways: list[list[str]] = []
        for number, name in re.findall(r"^(\d+)\. .*?`([\w/]+\.py)`", section[1] if section else "", re.M):
            if number == "1":
                ways.append([])
            ways[-1].append(name)
        return ways

    def faults_of_ways(self) -> list[str]:
        """Return what is wrong with the three ways as the page gives them."""
        ways = self.ways()
        faults = [] if len(ways) == 3 else [f"docs/architecture.md has {len(ways)} ways"]
        faults += [
            f"way {number} has {len(way)} files"
            for number, way in enumerate(ways, 1)
            if len(way) != WAY_FILES
        ]
        return faults + [
            f"there is no {name}" for way in ways for name in way if not (self.root / name).exists()
        ]


def _members(node: ast.ClassDef) -> set[str]:
    """Return the names of a class's attributes, and of its methods with their number of arguments."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and part in node.body:
            attribute = any("property" in ast.unparse(decorator) for decorator in part.decorator_list)
            found.add(part.name if attribute else f"{part.name}/{len(part.args.args + part.args.kwonlyargs)}")
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            found.add(part.target.id)
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            found.add(part.attr)
    return {name for name in found if not name.startswith("__init__")}


def single(protocols: dict[str, list[str]]) -> list[str]:
    """Return the Protocols with fewer than two implementations that no reason is known for."""
    return [name for name, found in protocols.items() if len(found) < 2 and name not in WITH_REASON]


def figures(tree: Tree) -> dict[str, object]:
    """Return every figure by name."""
    lines = tree.lines
    longest = max(lines, key=lambda name: lines[name])
    typed, untyped = tree.operations
    return {
        "product lines": sum(lines.values()),
        "files": len(lines),
        "lines of the median file": round(median(lines.values())),
        "lines of the longest file": f"{lines[longest]} ({longest})",
        "class names that occur twice": len(tree.classes_named_twice()),
        "forbidden words": len(tree.words()),
        "circles between files": len(tree.circles()),
        "upward imports": len(tree.upward()),
        "Protocols": len(tree.protocols()),
        "Protocols with one implementation": len(single(tree.protocols())),
        "Protocols kept for a reason": len(WITH_REASON.keys() & tree.protocols().keys()),
        "HTTP operations": len(typed) + len(untyped),
        "HTTP operations without a typed body": len(untyped),
        "files of the three ways": ", ".join(str(len(way)) for way in tree.ways()) or "not listed",
    }


def zeros(tree: Tree) -> dict[str, list[str]]:
    """Return what has to be empty, by name."""
    return {
        "class names that occur twice": tree.classes_named_twice(),
        "forbidden words": tree.words(),
        "circles between files": tree.circles(),
        "upward imports": tree.upward(),
        "Protocols with one implementation": single(tree.protocols()),
        "HTTP operations without a typed body": tree.operations[1],
        "faults of the three ways": tree.faults_of_ways(),
    }


def main(roots: list[str]) -> None:
    """Print a column for each tree, and what is not zero in the last."""
    trees = [Tree(Path(root).resolve()) for root in roots] or [Tree(ROOT)]
    columns = [figures(tree) for tree in trees]
    for name in columns[0]:
        print(f"{name:38}", *(f"{column[name]!s:>36}" for column in columns))
    for name, found in zeros(trees[-1]).items():
        if found:
            print(f"\n{name}:", *found, sep="\n  ")
    print(
        "\nProtocols kept for a reason:", *(f"{name}: {why}" for name, why in WITH_REASON.items()), sep="\n  "
    )


if __name__ == "__main__":
    main(sys.argv[1:])
