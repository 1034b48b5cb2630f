"""The tree stays as plain as `make house` shows it: what has to be zero is zero."""

import subprocess
from pathlib import Path

from tests.house import ROOT, Tree, zeros

# Put together, so that this file does not count.
WORD = "some" + "body"


def test_what_has_to_be_zero_is_zero() -> None:
    assert {name: faults for name, faults in zeros(Tree(ROOT)).items() if faults} == {}


def test_each_fault_is_found(tmp_path: Path) -> None:
    contract = '{type = "layers", layers = ["actors", "azu.jobs | azu.money", "azu.units"]}'
    files = {
        "pyproject.toml": f"[tool.importlinter]\ncontracts = [{contract}]",
        "README.md": f"For {WORD}, or no\nbody. {WORD.title()}.",
        "actors/node.py": "from typing import Protocol\nclass Port(Protocol):\n    def send(self, to): ...",
        "azu/jobs.py": "import azu.money\nclass Post: ...\nclass Sender:\n    def send(self, to): ...",
        "azu/money.py": "def late():\n    from azu import jobs\nclass Post: ...",
        "azu/units.py": "from actors.node import Port",
        "docs/architecture.md": "## The three ways\n1. First `azu/jobs.py`\n2. Then `azu/gone.py`\n## Floors",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    tree = Tree(tmp_path)

    assert tree.classes_named_twice() == ["Post"]
    assert tree.words() == [f"README.md: {WORD}", f"README.md: {WORD.title()}"]
    assert tree.circles() == ["azu.jobs <-> azu.money"]
    assert tree.upward() == ["azu.jobs -> azu.money", "azu.money -> azu.jobs", "azu.units -> actors.node"]
    assert tree.protocols() == {"Port": ["Sender"]}
    assert tree.faults_of_ways() == [
        "docs/architecture.md has 1 ways",
        "way 1 has 2 files",
        "there is no azu/gone.py",
    ]
