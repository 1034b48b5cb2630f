import os
import signal
import time

import pytest

from azu.cli.network.interrupts import ending_as_interrupt
from azu.cli.network.watching import watch


def test_an_interrupt_that_a_library_swallowed_ends_the_watch() -> None:
    looks = []

    def revive() -> list[str]:
        looks.append(time.monotonic())
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except KeyboardInterrupt:
            pass  # as a finalizer does
        return []

    with ending_as_interrupt() as ending, pytest.raises(KeyboardInterrupt):
        watch(revive, ending)

    assert len(looks) == 1
