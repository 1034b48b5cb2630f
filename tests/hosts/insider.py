"""A program on the head's host: it pays for a user, and reads from the stages which hidden states they got.

Usage: python -m tests.hosts.insider. Reads what `azu up` printed (its own command line goes to every node:
Ray shows it). Prints a user's API key as soon as its money is there and the model is up; then, when another
line comes, one line of JSON: the frames that stages were sent, in hex.
"""

import json
import sys

import ray
from eth_account import Account

from azu.client import Client
from azu.devnet.faucet import fund
from azu.money.chain.wallet import transfer_hype
from azu.units import LAMPORTS_PER_HYPE
from tests.hosts.network import trust
from tests.network.actors import actors_named, ask_inside
from tests.network.test_hidden_states import keep_frames, kept_frames

MODEL = "azu/tiny-dense"


def main() -> None:
    facts = json.loads(sys.stdin.readline())
    client = Client(facts["url"], tls=trust(facts))
    wallet = Account.create()
    api_key = client.login(wallet)
    fund(facts["chain_url"], wallet.address, 2 * LAMPORTS_PER_HYPE)
    tx_hash = transfer_hype(
        wallet, facts["platform_address"], LAMPORTS_PER_HYPE, chain_url=facts["chain_url"]
    )
    while client.deposit(tx_hash, wallet.address).status != "credited":
        pass
    client.generate("Hello", model=MODEL, max_tokens=1)
    ray.init(facts["head"], namespace="azu", log_to_driver=False, logging_level="ERROR")
    stages = actors_named("layer:azu-tiny-dense")
    for stage in stages[1:]:
        ask_inside(stage, keep_frames)
    print(json.dumps({"api_key": api_key, "stages": len(stages)}), flush=True)
    sys.stdin.readline()
    kept = [frame.hex() for stage in stages[1:] for frame in ask_inside(stage, kept_frames)]
    print(json.dumps(kept), flush=True)


if __name__ == "__main__":
    main()
