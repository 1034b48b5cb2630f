"""What a test's process logs, as the network's processes write it."""

import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from azu.logs import start_logging

Lines = Callable[[], list[dict[str, Any]]]


@contextmanager
def logged(*args: Any, **options: Any) -> Iterator[Lines]:
    """Log as `start_logging` says for the length of the block; yields what returns the lines so far."""
    stream, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    start_logging("test", *args, stream=stream, **options)
    try:
        yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
