"""The models that are fetched and cut now: each in a thread, once for all callers, and no caller waits."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from azu.models.registry import ModelRegistry
from azu.protocol.structure import Structure

# A slow model keeps its thread, and others are cut beside it.
_AT_ONCE = 8
# Callers ask again several times a second. An end that no caller took for so long is an old one.
_END_KEPT_S = 10.0


class Cuts:
    """Cuts models of a registry; the method is thread-safe."""

    def __init__(self, models: ModelRegistry, now_s: Callable[[], float] = time.monotonic) -> None:
        self._models = models
        self._now_s = now_s
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="cut")
        # The cuts of now, and when each was last asked for.
        self._cuts: dict[tuple[str, str], tuple[Future[Structure], float]] = {}
        self._joining = threading.Lock()

    def ensure(self, model_id: str, revision: str) -> Structure | None:
        """Return a model's structure, or None while it is cut; the first call for a model starts that.

        Raises what the cut raised; the call after it starts the cut again.
        """
        with self._joining:
            self._cuts = {model: one for model, one in self._cuts.items() if not self._is_old(*one)}
            ready = self._models.structure(model_id, revision)
            cut, _ = self._cuts.pop((model_id, revision), (None, 0.0))
            if ready is not None:
                return ready
            if cut is None:
                cut = self._submit(model_id, revision)
            if not cut.done():
                self._cuts[model_id, revision] = (cut, self._now_s())
                return None
        return cut.result()

    def start(self, model_id: str, revision: str) -> None:
        """Begin to cut a model unless it is being cut; its status says how that ends."""
        with self._joining:
            cut, _ = self._cuts.get((model_id, revision), (None, 0.0))
            if cut is None or cut.done():
                self._cuts[model_id, revision] = (self._submit(model_id, revision), self._now_s())

    def _submit(self, model_id: str, revision: str) -> Future[Structure]:
        return self._threads.submit(self._models.ensure_cut, model_id, revision)

    def _is_old(self, cut: Future[Structure], asked_s: float) -> bool:
        return cut.done() and self._now_s() - asked_s > _END_KEPT_S
