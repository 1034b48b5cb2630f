"""What the modules inside a forward have to know of the step, and what they report of it."""

import torch
from torch import Tensor

from azu.engine.expert_frames import StepId
from azu.engine.layout import Layout
from azu.protocol.step import ExpertWork


class StepContext:
    """The step under way on one stage."""

    def __init__(self) -> None:
        self._step: StepId | None = None
        self._layout: Layout | None = None
        self._owners = torch.empty(0, dtype=torch.long)
        self._work: list[ExpertWork] = []

    def begin(self, step: StepId, layout: Layout) -> None:
        """Start a step."""
        self._step, self._layout, self._work = step, layout, []
        counts = torch.tensor([piece.num_tokens for piece in layout.slices])
        self._owners = torch.repeat_interleave(torch.arange(len(counts)), counts)

    @property
    def step(self) -> StepId:
        """Which step it is."""
        assert self._step is not None, "begin() comes first"
        return self._step

    @property
    def layout(self) -> Layout:
        """How its slices lie in the forward."""
        assert self._layout is not None, "begin() comes first"
        return self._layout

    @property
    def work(self) -> tuple[ExpertWork, ...]:
        """What was activated in the layers whose experts are spread."""
        return tuple(self._work)

    def add_work(self, layer: int, node_id: str, activated_bytes: Tensor) -> None:
        """Count parameter bytes [tokens] that a node activated for each token row in a layer."""
        slices = self.layout.slices
        totals = torch.zeros(len(slices), dtype=torch.long)
        totals.index_add_(0, self._owners, activated_bytes.cpu())
        self._work += [
            ExpertWork(piece.sequence_id, layer, node_id, total)
            for piece, total in zip(slices, totals.tolist(), strict=True)
            if total
        ]
