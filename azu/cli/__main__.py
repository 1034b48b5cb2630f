"""`python -m azu.cli`: how azu starts processes of its own."""

from azu.cli import main

main()
