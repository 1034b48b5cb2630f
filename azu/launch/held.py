"""A name that one process of this machine holds at a time."""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held(name: str) -> Iterator[bool]:
    """Hold a name during the block; yields False where another process, of any user, holds it.

    The name is that of a socket without a file: the kernel frees it when the process ends, however it ends.
    """
    with socket.socket(socket.AF_UNIX) as own:
        try:
            own.bind(f"\0azu-{name}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            yield False
        else:
            yield True
