"""Imports of transformers without what azu does not use of it, in the processes that wait for them.

torch's compiler, its tensors over several devices and sympy, which both bring, take as long to import as
torch and transformers themselves. A later import of any of them finds the real one.
"""

import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_HIGHER_ORDER = f"{_COMPILER}._trace_wrapped_higher_order_op"
# Modules are replaced for all threads.
_replacing = threading.Lock()
_DECORATORS = ("disable", "allow_in_graph", "assume_constant_result")


def import_for_stages() -> None:
    """Import torch, and what stages and the registry use of transformers; does nothing a second time."""
    if "torch" in sys.modules:
        return
    torch = import_module("torch")
    with _compiler_replaced():
        utils = import_module("transformers.utils")
        for name in ("is_torch_distributed_available", "is_torch_flex_attn_available"):
            for module in (utils, utils.import_utils):
                setattr(module, name, bool)
        for name in ("modeling_utils", "masking_utils", "conversion_mapping"):
            import_module(f"transformers.{name}")
    vars(torch).pop("_dynamo", None)


def import_for_tokenizers() -> None:
    """Import what tokenizers use of transformers, which takes torch for missing from then on."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return None if name == "torch" else find_spec(name, package)

    importlib.util.find_spec = find
    try:
        import_module("transformers.utils").is_torch_available()
    finally:
        importlib.util.find_spec = find_spec


@contextmanager
def without_compiler() -> Iterator[None]:
    """Have torch's functions for the meta device, which ask the compiler to leave them out, do without it.

    What a function was given here, it keeps: the compiler is not imported for it later.
    """
    if _COMPILER in sys.modules:
        yield
        return
    with _replacing, _compiler_replaced():
        yield
    vars(sys.modules["torch"]).pop("_dynamo", None)


@contextmanager
def _compiler_replaced() -> Iterator[None]:
    """Put modules in place of the compiler's whose decorators change nothing."""
    compiler, higher_order = ModuleType(_COMPILER), ModuleType(_HIGHER_ORDER)
    for name in _DECORATORS:
        setattr(compiler, name, _unchanged)
    # A module that has a path is a package.
    vars(compiler)["__path__"] = []
    higher_order.TransformGetItemToIndex = _later  # type: ignore[attr-defined]
    own = {_COMPILER: compiler, _HIGHER_ORDER: higher_order}
    sys.modules.update(own)
    try:
        yield
    finally:
        for name in own:
            del sys.modules[name]


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """Stand for a decorator of the compiler, with arguments or without."""
    return (lambda inner: inner) if function is None else function


def _later() -> Any:
    """Return the context in which masks of some models are made."""
    return import_module(_HIGHER_ORDER).TransformGetItemToIndex()
