"""Write what this release leaves on disk: `python -m tests.releases.make` makes VERSION.tar.gz beside it.

A release adds its file once, before its tag; a file that is there is never made again.
"""

import io
import json
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from azu.client import Client
from azu.launch.local_network import demo_network
from azu.units import LAMPORTS_PER_HYPE
from tests.network.conftest import paying_user

FOLDER = Path(__file__).parent
# What the next start makes anew is left out.
_KEPT = ("format.json", "redis/appendonlydir", "redis-jobs/appendonlydir", "ledger", "signer.json")
_KEYS = ("receipt-key.json", "devnet.key", "devnet-admin.key", "devnet.jsonl")


def main() -> None:
    """Run a network, have it do one thing of each kind, and pack its home."""
    archive = FOLDER / f"{version('azu')}.tar.gz"
    if archive.exists():
        raise SystemExit(f"{archive} exists")
    with tempfile.TemporaryDirectory(prefix="azu-", dir="/tmp") as folder:
        home = Path(folder)
        facts = _lived(home)
        with tarfile.open(archive, "x:gz") as tar:
            text = json.dumps(facts, indent=1).encode()
            member = tarfile.TarInfo("facts.json")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
            for name in (*_KEPT, *_KEYS):
                tar.add(home / name, name)
    print(archive, archive.stat().st_size, "bytes")


def _lived(home: Path) -> dict[str, Any]:
    """Run a network with one deposit, job, payout and withdrawal, and return what it said of them."""
    with demo_network(home, print) as network:
        user = paying_user(network, "first")
        client = Client(network.url, user.api_key)
        body = {"model": "azu/tiny-dense", "prompt": "Hello", "max_tokens": 4, "ignore_eos": True}
        user.http.post("/v1/completions", json=body).raise_for_status()
        (job,) = client.jobs()
        withdrawn = client.withdraw(user.account, LAMPORTS_PER_HYPE // 4)
        deadline = time.monotonic() + 120
        while client.withdrawal(withdrawn.nonce).state != "paid":
            assert time.monotonic() < deadline
            time.sleep(0.5)
        balance = client.balance()
        return {
            "platform": network.platform_address,
            "address": user.address,
            "api_key": user.api_key,
            "available_lamports": balance.available_lamports,
            "job_id": job.job_id,
            "charged_lamports": job.charged_lamports,
            "withdrawal_nonce": withdrawn.nonce,
        }


if __name__ == "__main__":
    main()
