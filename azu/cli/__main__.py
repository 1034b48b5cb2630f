"""`python -m azu.cli`, which is also how azu starts processes of its own, and the program `azu`."""

import sys
from pathlib import Path
from typing import Any

from azu import cli


def main() -> None:
    """Run the command line in a process of its own."""
    # httpx imports these where they are installed, which takes a third of a command; no command uses them.
    unused: Any = None
    sys.modules["httpx._main"] = sys.modules["trio"] = unused
    cli.main()


if __name__ == "__main__":
    # Python puts the working directory first: a folder of the user's could be imported in place of azu's.
    if not sys.flags.safe_path and Path(sys.path[0]) != Path(__file__).parents[2]:
        del sys.path[0]
    main()
