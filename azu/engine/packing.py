"""Which families take packed batches: tried on the meta device, once per stage that is built."""

from inspect import signature

import torch
from transformers import PreTrainedConfig

from azu.architecture.description import Architecture
from azu.architecture.skeleton import build_from
from azu.architecture.trace import trace
from azu.engine.attention import CURRENT_LAYOUT, PACKED
from azu.engine.layout import LayoutBuilder
from azu.errors import UnsupportedModel
from azu.protocol.step import Slice

_NUM_TOKENS = 5


def takes_packed_batches(config: PreTrainedConfig, architecture: Architecture) -> bool:
    """Say whether a family's forward runs with attention of ours and positions of ours.

    It does when every layer asks transformers' interface for attention, hands masks on untouched, and takes
    the positions of its tokens.
    """
    model = build_from(config)
    decoder = model.get_submodule(architecture.layers_path.rpartition(".")[0])
    if not model._supports_attention_backend or "position_ids" not in signature(decoder.forward).parameters:
        return False
    # Only now: a family without the interface may not even be built with an attention that it does not know.
    model = build_from(config, attention=PACKED)
    meta = torch.device("meta")
    layout = LayoutBuilder(1, _NUM_TOKENS, meta).packed([Slice(0, 0, _NUM_TOKENS, (0,), sample=False)])
    token = CURRENT_LAYOUT.set(layout)
    try:
        trace(model)
    except UnsupportedModel:
        return False
    finally:
        CURRENT_LAYOUT.reset(token)
    return True
