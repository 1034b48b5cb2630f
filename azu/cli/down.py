"""`azu down`: stop the network that `azu up` runs on this machine."""

from azu.cli.output import console, done

_TIMEOUT_S = 60.0


def down() -> None:
    """Stop the network that runs out of AZU_HOME, and everything that it started."""
    from azu.config import Settings
    from azu.launch.network_process import stop_network

    home = Settings.from_environment().home
    with console.status(f"Stopping the network in {home}"):
        stop_network(home, _TIMEOUT_S)
    console.print(done("stopped"))
