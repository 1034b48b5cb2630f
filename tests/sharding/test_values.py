import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from azu.sharding.values import all_finite, cast

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


def raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(bytearray(tensor.contiguous().view(torch.uint8).numpy().tobytes()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_every_16_bit_pattern_is_judged_as_torch_does(dtype):
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    name = str(dtype).removeprefix("torch.")
    content = raw(patterns)
    judged = [all_finite(content[start : start + 2], name) for start in range(0, len(content), 2)]
    assert judged == torch.isfinite(patterns).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@given(st.lists(st.floats(width=16), max_size=20))
def test_one_bad_value_anywhere_is_found(dtype, values):
    tensor = torch.tensor(values, dtype=dtype)
    assert all_finite(raw(tensor), str(dtype).removeprefix("torch.")) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_the_largest_values_are_finite(dtype):
    largest = torch.finfo(dtype).max
    name = str(dtype).removeprefix("torch.")
    assert all_finite(raw(torch.tensor([largest, -largest, 0.0, -0.0], dtype=dtype)), name)
    assert not all_finite(raw(torch.tensor([1.0, -float("inf")], dtype=dtype)), name)
    assert not all_finite(raw(-torch.tensor([1.0, float("nan")], dtype=dtype)), name)


@pytest.mark.parametrize("target", DTYPES, ids=NAMES)
@pytest.mark.parametrize("source", DTYPES, ids=NAMES)
def test_casting_is_torchs(source, target):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(source)
    found = cast(raw(values), str(source).removeprefix("torch."), str(target).removeprefix("torch."))
    assert bytes(found) == bytes(raw(values.to(target)))
