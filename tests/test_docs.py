"""Every path, command, name, variable, metric and HTTP operation that a page names exists."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
import typer

from azu.cli import app, loaded

ROOT = Path(__file__).parents[1]
PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")))
]
FOLDERS = ("azu", "actors", "configs", "deployments", "docs", "tests")
PATH = re.compile(rf"(?<![\w/.$-])(?:{'|'.join(FOLDERS)})/[\w./*-]*")
FILE = re.compile(r"^[\w.-]+\.(?:py|md|yaml|toml|lua|json)$|^Makefile$")
# A class, or a function that begins with an underscore; with a dot, a method.
NAME = re.compile(r"`(_[a-z]\w+|(?:[A-Z][a-z]+){2,}(?:\.\w+)?)`")
TEST = re.compile(r"(tests/[\w/]+\.py)::(test_\w+)")
METRIC = re.compile(r"\bazu_[a-z_]+[a-z]\b")
VARIABLE = re.compile(r"\bAZU_[A-Z][A-Z_]*[A-Z]\b")
OPERATION = re.compile(r"\b(?:GET|POST|DELETE) (/[\w/{}.-]+)|\$AZU_URL(/[\w/.-]+)")
ASSIGNMENT = re.compile(r"^[A-Z_]+=")
COMMANDS = ("azu", "make", "pytest")
# The names of the built-in models look like paths.
MODELS = ("azu/tiny-dense", "azu/tiny-moe")


def code(text: str) -> Iterator[str]:
    """Yield the code spans of a page, and the lines of its code blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    for block in fenced:
        yield from block.splitlines()
    for line in rest.splitlines():
        if line.startswith("    "):
            yield line
    # A span may go on in the next line.
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest))


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each azu, make and pytest command."""
    for line in code(text):
        if not re.search(rf"(?:^|[\s;&|])(?:{'|'.join(COMMANDS)}) ", line):
            continue
        for part in re.split(r";|&&|\|", re.sub(r"\s#\s.*", "", line)):
            try:
                words = shlex.split(part)
            except ValueError:  # a sentence with an apostrophe
                continue
            while words and ASSIGNMENT.match(words[0]):
                words.pop(0)
            if len(words) > 1 and words[0] in COMMANDS:
                yield words


def wrong_command(words: list[str]) -> str | None:
    """Return what is wrong with a command, or None."""
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        wanted = [word for word in arguments if "=" not in word]
        return next((f"make has no target {word}" for word in wanted if word not in targets), None)
    if program == "pytest":
        markers = [line.partition(":")[0] for line in pytest_settings()["markers"]]
        marked = " ".join(arguments[at + 1] for at, word in enumerate(arguments[:-1]) if word == "-m")
        named = set(re.findall(r"\w+", marked)) - {"not", "and", "or"}
        return next((f"there is no marker {name}" for name in named if name not in markers), None)
    return wrong_arguments(arguments)


@cache
def azu_command() -> click.Command:
    return typer.main.get_command(app)


def wrong_arguments(arguments: list[str]) -> str | None:
    command = azu_command()
    waiting = list(arguments)
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        if not waiting or waiting[0].startswith("-"):
            break
        name = waiting.pop(0)
        if name not in command.commands:
            return f"{command.name or 'azu'} has no command {name}"
        command = loaded(name) if command is azu_command() else command.commands[name]
    known = {"--help"}
    for parameter in command.params:
        known |= {*parameter.opts, *parameter.secondary_opts}
    options = [word.partition("=")[0] for word in waiting if re.match(r"^--?[a-z]", word)]
    wrong = next((option for option in options if option not in known), None)
    return None if wrong is None else f"azu {command.name} has no option {wrong}"


@cache
def pytest_settings() -> dict[str, list[str]]:
    settings: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"][
        "ini_options"
    ]
    return settings


@cache
def product() -> str:
    """Return all source text that may read an environment variable."""
    files = (path for folder in ("azu", "actors", "deployments") for path in (ROOT / folder).rglob("*.py"))
    return "\n".join(path.read_text() for path in files)


@cache
def words() -> frozenset[str]:
    """Return every word of the source text and of the alerts."""
    alerts = (ROOT / "configs" / "prometheus" / "alerts.yaml").read_text()
    return frozenset(re.findall(r"\w+", product() + alerts))


@cache
def operations() -> re.Pattern[str]:
    """Return what matches the path of an HTTP operation; docs/api.md lists them all."""
    page = (ROOT / "docs" / "api.md").read_text()
    paths = re.findall(r"^### (?:GET|POST|DELETE) (\S+)$", page, re.M)
    return re.compile("|".join(re.sub(r"\{.*?\}", "[^/]+", path) for path in [*paths, "/openapi.json"]))


@cache
def file_names() -> frozenset[str]:
    return frozenset(path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*"))


def exists(name: str) -> bool:
    """Return True for a path of the repository, and for the name of a file there or in the source text."""
    if "/" not in name and (name in file_names() or f'"{name}"' in product()):
        return True
    return any(ROOT.glob(name.rstrip("/")))


def has_test(path: str, name: str) -> bool:
    """Return whether a file of tests has a function with a name."""
    file = ROOT / path
    return file.exists() and re.search(rf"^(async )?def {name}\(", file.read_text(), re.M) is not None


def faults(text: str, folder: Path = ROOT) -> list[str]:
    """Return what a page names and what does not exist."""
    links = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
    names = [match.removesuffix("**").rstrip(".") for match in PATH.findall(links.sub("", text))]
    names += [span for span in re.findall(r"`([^`\s]+)`", text) if FILE.match(span)]
    found = {f"there is no {name}" for name in names if name not in MODELS and not exists(name)}
    found |= {f"there is no {target}" for target in links.findall(text) if not (folder / target).exists()}
    found |= {f"there is no {path}::{name}" for path, name in TEST.findall(text) if not has_test(path, name)}
    found |= {f"nothing reads {name}" for name in VARIABLE.findall(text) if name not in words()}
    found |= {f"there is no metric {name}" for name in METRIC.findall(text) if name not in words()}
    for name in NAME.findall(text):
        found |= {f"there is no {part}" for part in name.split(".") if part not in words()}
    asked = [(path or url).rstrip(".") for path, url in OPERATION.findall(text)]
    found |= {f"nothing answers {path}" for path in asked if not operations().fullmatch(path)}
    return sorted(found | {fault for words in commands(text) if (fault := wrong_command(words))})


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_only_what_exists(page: str) -> None:
    path = ROOT / page
    assert faults(path.read_text(), path.parent) == []


def test_the_architecture_page_names_every_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = [path for folder in ("azu", "actors", "deployments") for path in (ROOT / folder).rglob("*.py")]
    wanted = {path.name for path in files if path.parent.name != "cli"} - {"__init__.py"}
    assert sorted(name for name in wanted if f"`{name}`" not in page) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("See azu/gone.py.", "there is no azu/gone.py"),
        ("See `azu/jobs/gone_*.lua`.", "there is no azu/jobs/gone_*.lua"),
        ("See [here](docs/gone.md#a-part).", "there is no docs/gone.md"),
        ("See tests/test_docs.py::test_gone.", "there is no tests/test_docs.py::test_gone"),
        ("See `gone.yaml`.", "there is no gone.yaml"),
        ("    azu fly --json\n", "azu has no command fly"),
        ("    azu wallet burn\n", "wallet has no command burn"),
        ("Say `azu up --fast`.", "azu up has no option --fast"),
        ("Say `AZU_HOME=/tmp azu ps --fast`.", "azu ps has no option --fast"),
        ("    azu ps ; azu up --fast   # both\n", "azu up has no option --fast"),
        ("Run `make coffee`.", "make has no target coffee"),
        ("```bash\npytest -m 'swift and not prove' tests\n```\n", "there is no marker swift"),
        ("See `GoneClass`.", "there is no GoneClass"),
        ("See `StageRunner.gone_far`.", "there is no gone_far"),
        ("See `_gone`.", "there is no _gone"),
        ("Set `AZU_GONE`.", "nothing reads AZU_GONE"),
        ("`GET /v1/gone` and `GET /v1/models`", "nothing answers /v1/gone"),
        ("    curl $AZU_URL/v1/jobs/JOB/gone\n", "nothing answers /v1/jobs/JOB/gone"),
        ("Watch `azu_gone_total`.", "there is no metric azu_gone_total"),
    ],
)
def test_what_does_not_exist_is_found(text: str, fault: str) -> None:
    assert faults(text) == [fault]


def test_what_exists_is_no_fault() -> None:
    text = (
        "See azu/jobs/*.lua, tests/jobs, configs/network.yaml and `pyproject.toml`.\n\n"
        "    azu login --limit 0.2 --days 30   # a key\n"
        '    AZU_HOME=/tmp azu prompt "What is it?" --json\n\n'
        "`make house BEFORE=/tmp/before`, `azu down`, `pytest -m 'not prove' tests/jobs`, `AZU_HOME`, "
        "[the home](README.md#one-command), azu/tiny-moe"
    )
    assert faults(text) == []
