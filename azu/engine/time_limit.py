"""An end for code of others that may not have one."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTime(BaseException):
    """Raised inside the code whose time is over; whatever that catches, this it does not."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End what this thread runs in the block once it has taken so long; raises OutOfTime.

    Only Python code ends, between two of its instructions: one call into C goes on to its end.
    """
    thread_id = ctypes.c_ulong(threading.get_ident())
    lock, is_over = threading.Lock(), False

    def end() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, ctypes.py_object(OutOfTime))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        # If `end` has the lock already, OutOfTime comes up here.
        with lock:
            is_over = True
        timer.cancel()
