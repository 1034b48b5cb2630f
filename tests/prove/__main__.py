"""Usage: python -m tests.prove [--seed N] [--only WORD ...] [--list]

The seed reaches the tests as AZU_TEST_SEED. tests/REPORT.md is written after every part, so that a run that
is cut off says how far it came.
"""

import argparse
import sys

from rich.console import Console

from tests.prove.parts import PARTS, the_rest
from tests.prove.report import read_shown, run, write_report


def main() -> int:
    """Run the parts in order; exit 0 only if all passed."""
    parser = argparse.ArgumentParser(description="Run what takes longer than `make test`.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only", nargs="*", default=[], help="run the parts whose name has one of these words"
    )
    parser.add_argument("--list", action="store_true", help="print the parts' names and run nothing")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    parts = (*PARTS, the_rest())
    wanted = [
        part for part in parts if not arguments.only or any(word in part.name for word in arguments.only)
    ]
    if arguments.list:
        for part in wanted:
            console.print(f"{part.name} [dim]{part.shows}[/]")
        return 0
    failed = False
    for part in wanted:
        with console.status(part.name):
            one = run(part, arguments.seed)
        failed |= one.exit_status != 0
        console.print(
            f"{'[red]✗[/]' if one.exit_status else '[green]✓[/]'} {part.name} [dim]{one.seconds} s[/]"
        )
        # Read again: parts may run side by side.
        write_report(parts, read_shown() | {part.name: one})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
