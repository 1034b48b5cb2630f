"""`pip install azu` without extras runs each command that needs no node; the others say what is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

from eth_account import Account

from azu.protocol.structure import STRUCTURE_FILE
from tests.builders import structure
from tests.client.ingress import Reply, platform_of, running_ingress

# Run commands where only the packages of the base can be imported, and print how each ended.
PROGRAM = r"""
import json, re, sys, tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from packaging.requirements import Requirement

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

# Those of this tree, which need not be the ones that azu was installed with.
of_azu = tomllib.loads(open(sys.argv[1]).read())["project"]["dependencies"]
base, waiting = set(), ["azu"]
while waiting:
    name = waiting.pop()
    if plain(name) not in base:
        base.add(plain(name))
        try:
            wanted = map(Requirement, of_azu if name == "azu" else requires(name) or ())
        except PackageNotFoundError:
            continue
        waiting += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]

others = {
    module for module, packages in packages_distributions().items() if not {*map(plain, packages)} & base
}
for name in list(sys.modules):
    if name.partition(".")[0] in others:
        del sys.modules[name]

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in others:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
import contextlib, io
from azu import cli

for words in json.loads(sys.stdin.read()):
    sys.argv = ["azu", *words.split()]
    told, code = io.StringIO(), 0
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
    print(json.dumps([words, code, told.getvalue()]))
"""
PROJECT = Path(__file__).parents[2] / "pyproject.toml"
CLIENT = [
    "--help", "wallet show", "balance", "earnings", "jobs", "keys list", "models", "ps", "top --once",
    "leave ada", "chat", "pause ada", "resume ada", "plan cut --nodes nodes.yaml",
]  # fmt: skip
REFUSED = [
    "wallet balance", "wallet fund", "login", "deposit 1", "withdraw 1", "prompt hello", "receipt job-1",
    "dispute job-1", "quote x",
]  # fmt: skip
NODE = [
    "up", "up --background", "serve", "down", "demo", "join x --vram 1GiB --payout 0x1", "bench", "signer",
    "devnet", "shard azu/tiny-dense", "check azu/tiny-dense", "treasury", "treasury status", "ledger audit",
]  # fmt: skip


def ended(commands: list[str], home: Path, url: str) -> dict[str, tuple[object, str]]:
    environment = {"AZU_HOME": str(home), "AZU_URL": url, "AZU_API_KEY": "k", "AZU_WALLET_PASSWORD": "walk"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(PROJECT)],
        cwd=home,
        input=json.dumps(commands),
        env=kept | environment | {"COLUMNS": "200", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=110, check=True,
    )  # fmt: skip
    return {words: (code, told) for words, code, told in map(json.loads, done.stdout.splitlines())}


def test_the_base_runs_what_needs_no_node_and_names_the_extra_for_the_rest(tmp_path: Path) -> None:
    amounts = {"available_lamports": 5, "reserved_lamports": 1, "withdrawing_lamports": 2, "address": "0xa"}
    earned = {"earned_lamports": 5, "paying_lamports": 1, "paid_lamports": 2, "payout_threshold_lamports": 9}
    wallet = Account.encrypt("0x" + "07" * 32, "walk", kdf="pbkdf2", iterations=2)
    (tmp_path / "wallet.json").write_text(json.dumps(wallet))
    (tmp_path / "wallet.json").chmod(0o600)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / STRUCTURE_FILE).write_bytes(structure().to_json())
    (tmp_path / "nodes.yaml").write_text("nodes: [{name: ada, vram: 8GiB}]")
    with running_ingress() as ingress:
        platform_of(ingress)
        ingress.replies |= {
            "GET /v1/balance": Reply(amounts),
            "GET /v1/earnings": Reply({**earned, "address": "0xa", "claimed": True}),
            "GET /v1/jobs?limit=20": Reply({"data": []}),
            "GET /v1/auth/keys": Reply({"data": []}),
            "GET /v1/models": Reply({"data": []}),
            "GET /v1/network": Reply({"nodes": [], "deployments": []}),
            "POST /v1/nodes/ada/leave": Reply({"name": "ada", "left": True}),
            "POST /v1/nodes/ada/pause": Reply({"name": "ada", "paused": True, "empty": True}),
            "POST /v1/nodes/ada/resume": Reply({"name": "ada", "paused": False, "empty": False}),
        }
        found = ended([*CLIENT, *REFUSED, *NODE], tmp_path, ingress.url)

    assert {words: found[words] for words in CLIENT if found[words][0] != 0} == {}
    # The network of this test refuses these; it is no package that is missing.
    wrong = {words for words in REFUSED if found[words][0] != 1 or "is missing)" in found[words][1]}
    assert {words: found[words] for words in wrong} == {}
    needs = "this command needs: pip install 'azu[node]'"
    assert {words: found[words] for words in NODE if needs not in found[words][1]} == {}
