"""Running a model that was cut: hidden states injected at its first layer, captured after its last."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from azu.engine.attention import CURRENT_LAYOUT
from azu.engine.kv import PagedKV
from azu.engine.layout import Layout
from azu.engine.linear import PackedLinear


class StageModel:
    """A model cut to a span of its layers, with its weights; one forward at a time.

    What a family does around its layers (scales, learned positions, norms) happens once, on the stage it
    belongs to, because hidden states enter and leave at the layers themselves.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: nn.Module,
        layers: nn.ModuleList,
        *,
        embedding_width: int | None,
        packed: bool,
    ) -> None:
        """`embedding_width` is None on the first stage, which embeds; `packed` is the layout it takes."""
        self.packed = packed
        self.layers = layers
        self._model = model
        self._decoder = decoder
        self._embedding_width = embedding_width
        self._injected: Tensor | None = None
        self._captured = torch.empty(0)
        self._sampled: Tensor | None = None
        self._hook()

    def hidden(self, rows: Tensor, layout: Layout, kv: PagedKV) -> Tensor:
        """Run token ids [tokens] or hidden states [tokens, hidden]; return hidden states [tokens, hidden]."""
        self._forward(self._decoder, rows, layout, kv)
        return layout.flat(self._captured)

    def logits(self, rows: Tensor, layout: Layout, kv: PagedKV, sampled: Tensor) -> Tensor:
        """Run the last stage; return logits [len(sampled), vocabulary] of those flat rows of the forward."""
        if not len(sampled):
            self._forward(self._decoder, rows, layout, kv)
            return torch.empty(0, 0, device=rows.device)
        self._sampled = sampled
        logits: Tensor = self._forward(self._model, rows, layout, kv).logits
        return logits[0]

    def _forward(self, module: nn.Module, rows: Tensor, layout: Layout, kv: PagedKV) -> Any:
        kv.begin(layout)
        inputs = {"attention_mask": layout.attention_mask, "past_key_values": kv, "use_cache": True}
        batch = layout.batched(rows)
        if self._embedding_width is None:
            inputs["input_ids"] = batch
        else:
            self._injected = batch
            # Some families scale embeddings in place: they get zeros, never the hidden states.
            inputs["inputs_embeds"] = batch.new_zeros(*batch.shape[:2], self._embedding_width)
        token = CURRENT_LAYOUT.set(layout)
        try:
            return module(**inputs)
        finally:
            CURRENT_LAYOUT.reset(token)

    def _hook(self) -> None:
        if self._embedding_width is not None:
            self.layers[0].register_forward_pre_hook(self._inject, with_kwargs=True)
        self.layers[-1].register_forward_hook(self._capture)
        if "position_ids" in signature(self._decoder.forward).parameters:
            # At the decoder itself: models around it do not all hand positions on.
            self._decoder.register_forward_pre_hook(_place, with_kwargs=True)
        head = self._model.get_output_embeddings()
        if isinstance(head, nn.Linear | PackedLinear):
            head.register_forward_pre_hook(self._select)

    def _inject(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._injected, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._injected}

    def _capture(self, _module: nn.Module, _args: Any, out: Any) -> None:
        self._captured = out[0] if isinstance(out, tuple) else out

    def _select(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Only rows that are sampled from are worth the largest product of the model.
        assert self._sampled is not None
        return (args[0].flatten(0, -2)[self._sampled][None], *args[1:])


def _place(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "position_ids": CURRENT_LAYOUT.get().position_ids}
