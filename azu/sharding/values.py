"""Looking at raw tensor bytes: are they finite, and what are they in another dtype."""

import numpy as np
import torch

# The bits of infinity without a sign, in an integer of the dtype's width: every NaN stands above it.
_INFINITY = {
    "float64": (64, 0x7FF << 52),
    "float32": (32, 0xFF << 23),
    "float16": (16, 0x1F << 10),
    "bfloat16": (16, 0xFF << 7),
}


def all_finite(content: memoryview, dtype: str) -> bool:
    """Say whether whole values of a float dtype hold neither NaN nor infinity.

    As signed integers the positive ones have the largest bits, as unsigned ones the negative ones: two
    maxima tell, without a copy and as fast as memory is read.
    """
    width, infinity = _INFINITY[dtype]
    bits = np.frombuffer(content, dtype=f"uint{width}")
    if bits.size == 0:
        return True
    sign = 1 << (width - 1)
    return int(bits.max()) < infinity | sign and int(bits.view(f"int{width}").max()) < infinity


def cast(content: memoryview, source: str, target: str) -> memoryview:
    """Return whole values of one float dtype in another (torch's names), rounded to nearest."""
    values = torch.frombuffer(content, dtype=getattr(torch, source)).to(getattr(torch, target))
    return values.view(torch.uint8).numpy().data
