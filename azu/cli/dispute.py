"""`azu dispute`: money of a job that went wrong is held until the network's admin decides."""

from typing import Annotated

import typer

from azu.cli.credentials import open_client
from azu.cli.output import AsJson, show
from azu.units import hype_from_lamports


def dispute(
    job_id: Annotated[str, typer.Argument(help="The id of a job that you paid for.")], as_json: AsJson = False
) -> None:
    """Have what workers and platform got for a job be held, before they are paid; your wallet signs that."""
    from azu.cli.wallet import unlock
    from azu.config import Settings

    found = open_client().dispute(job_id, unlock(Settings.from_environment().home))
    held = hype_from_lamports(found.held_lamports)
    show(found, as_json, lambda _: f"{held} HYPE of {job_id} are held until the network's admin decides")
