"""What a scheduler or a node imports of the models loads neither torch nor transformers."""

import subprocess
import sys


def test_status_description_and_shard_cache_load_no_torch() -> None:
    program = (
        "import sys, azu.models, azu.models.description, azu.models.shard_cache, azu.models.status;"
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)

    assert printed == "set()\n"
