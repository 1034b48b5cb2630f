"""The processes of the pieces load only what they use."""

import subprocess
import sys


def test_a_stage_and_an_expert_set_load_nothing_of_money_or_of_the_head() -> None:
    program = (
        "import sys, actors.layer, actors.expert;"
        "print({'eth_account', 'fastapi', 'hyperliquid', 'redis', 'torch'} & sys.modules.keys())"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)

    assert printed == "set()\n"
