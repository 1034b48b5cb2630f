"""The commands of docs/api.md run as they are written, on an ingress."""

import json
import os
import re
import subprocess
from pathlib import Path

import httpx
from eth_account import Account
from eth_account.messages import encode_defunct

from tests.deployments.served import served

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def typed(url: str, *lines: str) -> str:
    """Run lines in a shell and return what they print."""
    command = ("bash", "-c", "\n".join(("set -e", *lines)))
    environment = os.environ | {"AZU_URL": url}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=300
    ).stdout


def test_the_commands_that_open_a_key_do_so_with_a_signature_between_them(
    redis_url: str, tmp_path: Path
) -> None:
    *ask, open_it = re.findall(r"^    (.*)$", PAGE.read_text().partition("\n## ")[0], re.M)
    account, kept = Account.create(), tmp_path / "key"
    ask = [line.replace("0xYOURS", account.address) for line in ask]
    with served(redis_url, tmp_path) as here:
        asked = json.loads(typed(here.url, *ask, f'printf %s "$KEY" > {kept}'))
        signed = account.sign_message(encode_defunct(text=asked["message"])).signature.to_0x_hex()
        values = {"NONCE": asked["nonce"], "0xSIGNATURE": signed}
        for word, value in values.items():
            open_it = open_it.replace(word, value)
        typed(here.url, next(line for line in ask if line.startswith("JSON=")), open_it)

        headers = {"authorization": f"Bearer {kept.read_text()}"}
        found = httpx.get(f"{here.url}/v1/balance", headers=headers, timeout=60)
        assert (found.status_code, found.json()["address"]) == (200, account.address.lower())
