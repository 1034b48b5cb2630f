"""`python -m azu.cli`, which is also how azu starts processes of its own."""

import sys
from pathlib import Path

from azu.cli import main

# Python puts the working directory first, so that a folder of the user's could be imported in place of azu's.
if not sys.flags.safe_path and Path(sys.path[0]) != Path(__file__).parents[2]:
    del sys.path[0]

main()
