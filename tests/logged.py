"""The log lines of a test's process, as the network's processes write them."""

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
    """Log as `start_logging` does inside the block; yields a function that returns the lines so far."""
    stream, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    start_logging("test", *args, stream=stream, **options)
    try:
        yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
