"""The client is light: heavy packages are imported only where they are used."""

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "transformers",
    "ray",
    "fastapi",
    "redis",
    "numpy",
    "cryptography",
    "psutil",
    "huggingface_hub",
    "prometheus_client",
)
# What only a login and a wallet's signature need.
OF_A_WALLET = ("eth_account", "eth_utils", "hyperliquid", "requests")
# What the client needs, and the text that explains a command does not.
OF_THE_CLIENT = ("httpx", *OF_A_WALLET)


def modules_after(statement: str) -> set[str]:
    """Return the names of all top-level modules after a statement ran in a new interpreter."""
    program = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "statement",
    [
        "import azu",
        "import azu; azu.Client('http://127.0.0.1:9', '')",
    ],
)
def test_nothing_heavy_is_loaded(statement: str) -> None:
    assert modules_after(statement).isdisjoint({*HEAVY, *OF_A_WALLET})


def test_the_help_loads_neither_what_is_heavy_nor_the_client() -> None:
    shown = (
        "from typer.testing import CliRunner; from azu.cli import app; CliRunner().invoke(app, ['--help'])"
    )

    assert modules_after(shown).isdisjoint(HEAVY + OF_THE_CLIENT)


def test_importing_azu_alone_loads_no_http_client() -> None:
    assert modules_after("import azu; azu.__version__; azu.errors").isdisjoint({"httpx", "pydantic"})
