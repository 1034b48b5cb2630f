"""Parameters of which `make test` runs a few, and `make prove` the others."""

from collections.abc import Iterable

import pytest


def few(values: Iterable[object], number: int = 1) -> list[object]:
    """Mark the parameters behind the first ones for `make prove`; a tuple has a value for each argument."""
    listed = list(values)
    later = (
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.prove)
        for value in listed[number:]
    )
    return [*listed[:number], *later]
