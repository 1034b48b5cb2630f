"""Ctrl-C, SIGTERM and SIGHUP: none of them may leave a process behind."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM for the length of the block; they arrive after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    try:
        with _handled_by(note):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


class Ending:
    """Whether somebody asked a block to end.

    An interrupt that came while a finalizer or a callback of Ray's ran is printed there and forgotten.
    """

    def __init__(self) -> None:
        self._asked = False

    def interrupt(self, _: int, __: FrameType | None) -> None:
        """Interrupt whatever runs; a signal handler."""
        self._asked = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt once more if one came."""
        if self._asked:
            raise KeyboardInterrupt


@contextmanager
def ending_as_interrupt() -> Iterator[Ending]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that whatever it started is stopped."""
    ending = Ending()
    with _handled_by(ending.interrupt):
        yield ending


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put this process's handlers back after the block: connecting to Ray replaces them by its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
