"""Packed weights give the same product as plain ones, for any number of rows."""

import pytest
import torch
from torch.nn.functional import linear

from azu.engine.weights import PackedLinear, can_pack

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="this build of torch has no oneDNN"
)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 2), (1, 9), (1, 0), (1,), (2,)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_packed_product_equals_the_plain_one(shape: tuple[int, ...], with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(320, 256, generator=generator)
    bias = torch.randn(320, generator=generator) if with_bias else None
    x = torch.randn(*shape, 256, generator=generator)

    found = PackedLinear(weight, bias)(x)

    assert found.shape == (*shape, 320)
    torch.testing.assert_close(found, linear(x, weight, bias), rtol=1e-4, atol=1e-4)
