"""Imports of transformers without what azu does not use of it, in the processes that wait for them.

torch's compiler, its tensors over several devices and sympy, which both bring, take as long to import as
torch and transformers themselves. A later import of any of them finds the real one.
"""

import importlib.util
import sys
import threading
from importlib import import_module
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_HIGHER_ORDER = f"{_COMPILER}._trace_wrapped_higher_order_op"
_DECORATORS = ("disable", "allow_in_graph", "assume_constant_result")


def import_for_stages() -> None:
    """Import torch, and what stages and the registry use of transformers; does nothing a second time."""
    if "torch" in sys.modules:
        return
    import_module("torch")
    with without_compiler:
        utils = import_module("transformers.utils")
        for name in ("is_torch_distributed_available", "is_torch_flex_attn_available"):
            for module in (utils, utils.import_utils):
                setattr(module, name, bool)
        for name in ("modeling_utils", "masking_utils", "conversion_mapping"):
            import_module(f"transformers.{name}")


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


class _StandIn(ModuleType):
    """A module in place of one of the compiler's; what it lacks, the real one has, which comes back then."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _take_away()
        return getattr(import_module(self.__name__), name)


class _WithoutCompiler:
    """Has functions that ask torch's compiler to leave them out, as those of the meta device, do without it.

    What a function was given then, it keeps: the compiler is not imported for it later. The modules in place
    of the compiler's are there while any thread needs them, so that none waits for another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_users and _COMPILER not in sys.modules:
                _put_in_place()
            self._num_users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_users -= 1
            if not self._num_users:
                _take_away()


without_compiler = _WithoutCompiler()


def _put_in_place() -> None:
    """Put modules in place of the compiler's whose decorators change nothing."""
    compiler, higher_order = _StandIn(_COMPILER), _StandIn(_HIGHER_ORDER)
    for name in _DECORATORS:
        setattr(compiler, name, _unchanged)
    # A module that has a path is a package.
    vars(compiler)["__path__"] = []
    vars(higher_order)["TransformGetItemToIndex"] = _later
    sys.modules.update({_COMPILER: compiler, _HIGHER_ORDER: higher_order})


def _take_away() -> None:
    for name in (_COMPILER, _HIGHER_ORDER):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]
    attributes = vars(sys.modules["torch"])
    if isinstance(attributes.get("_dynamo"), _StandIn):
        del attributes["_dynamo"]


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """Stand for a decorator of the compiler, with arguments or without."""
    return (lambda inner: inner) if function is None else function


def _later() -> Any:
    """Return the context in which masks of some models are made."""
    return import_module(_HIGHER_ORDER).TransformGetItemToIndex()
