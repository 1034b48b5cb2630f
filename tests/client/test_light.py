"""The client is light: heavy packages are imported only where they are used."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "ray", "fastapi", "redis")


def modules_after(statement: str) -> set[str]:
    """Return the names of all top-level modules after a statement ran in a new interpreter."""
    program = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "statement",
    [
        "import azu",
        "import azu; azu.Client",
        "from typer.testing import CliRunner; from azu.cli import app; CliRunner().invoke(app, ['--help'])",
    ],
)
def test_nothing_heavy_is_loaded(statement: str) -> None:
    assert modules_after(statement).isdisjoint(HEAVY)


def test_importing_azu_alone_loads_no_http_client() -> None:
    assert "httpx" not in modules_after("import azu")
