"""Calling a function in a process of its own, which takes its memory and threads with it."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

from azu.errors import DeadlineExceeded

P = ParamSpec("P")
T = TypeVar("T")


def call_apart(timeout_s: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return a function's result; raises DeadlineExceeded when it is not there in time."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result(timeout_s)
        except TookTooLong as error:
            for process in list(pool._processes.values()):
                process.kill()
            raise DeadlineExceeded(f"{function.__name__} took more than {timeout_s:.0f} s") from error
