"""`ray start` without the parts of Ray's command line that azu has no use for.

Ray's own script also imports the commands of Serve, jobs and state, which doubles the time of every node's
start; and it opens Ray Client's server, one more door, wherever grpc can be imported.

Usage: python -m azu.cli.network.ray_start start OPTIONS...
"""

import sys
import time

from azu.cli.network.ports import accepts

_UNUSED = ("ray.serve.scripts", "ray.util.state.state_cli", "ray.dashboard.modules.job.cli", "grpc")
_HEAD_TIMEOUT_S = 60.0


def main() -> None:
    """Run Ray's command line; nodes that join wait for their head first, so that all may start at once."""
    # Python's own way to make an import fail.
    sys.modules.update(dict.fromkeys(_UNUSED))  # type: ignore[arg-type]
    from ray.scripts.scripts import main as ray

    if "--address" in sys.argv:
        host, _, port = sys.argv[sys.argv.index("--address") + 1].rpartition(":")
        deadline = time.monotonic() + _HEAD_TIMEOUT_S
        while not accepts(host, int(port)):
            if time.monotonic() > deadline:
                sys.exit(f"no head answers at {host}:{port}")
            time.sleep(0.05)
    ray()


if __name__ == "__main__":
    main()
