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
OF_THE_CLIENT = ("httpx", "pydantic", "yaml", *OF_A_WALLET)
# What httpx imports for its own command and for an event loop, and the settings of a whole network.
UNUSED = ("httpx._main", "click", "pygments", "trio", "asyncio", "azu.config.network", "azu.planner")


def modules_after(statement: str) -> set[str]:
    """Return the names of all modules after a statement ran in a new interpreter."""
    program = f"import sys\n{statement}\nprint(*(name for name, one in sys.modules.items() if one))"
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


def test_a_command_that_asks_the_network_loads_no_more_than_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZU_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AZU_API_KEY", "k")
    called = "sys.argv = ['azu', 'models']; from azu.cli.__main__ import main"

    loaded = modules_after(f"{called}\ntry: main()\nexcept SystemExit: pass")

    assert "httpx" in loaded
    assert loaded.isdisjoint({*HEAVY, *OF_A_WALLET, *UNUSED})


def test_importing_azu_alone_loads_no_http_client() -> None:
    assert modules_after("import azu; azu.__version__; azu.errors").isdisjoint({"httpx", "pydantic"})
