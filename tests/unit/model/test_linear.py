"""Linear layers against torch's own, in the precision in which they are trained."""

import pytest
import torch
from torch.nn import functional as F

from ssl_vit.model import linear
from ssl_vit.model.linear import GeluLinear


@pytest.mark.parametrize("amx", [False, True])
def test_gradients_in_bfloat16_are_those_of_autograd(amx, monkeypatch):
    """With a copy of the narrower operand and without: the same sums, rounded once."""
    monkeypatch.setattr(linear, "HAS_AMX", amx)
    torch.manual_seed(0)
    shapes = {"h": (4, 50, 96), "weight": (24, 96), "bias": (24,)}
    tensors = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes.values()]
    grad = torch.randn(4, 50, 24).bfloat16()
    h, weight, bias = tensors
    expected = torch.autograd.grad(F.linear(F.gelu(h), weight, bias), tensors, grad)
    found = torch.autograd.grad(GeluLinear.apply(h, weight, bias), tensors, grad)
    for name, a, b in zip(shapes, found, expected, strict=True):
        assert a.is_contiguous(), name
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * float(b.abs().mean()), msg=name)
