"""Clipping on a GPU: the numbers of the CPU's loop, and few kernels; tensors are fake there."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.common.config import OptimConfig
from ssl_vit.model.architecture import without_memory
from ssl_vit.training import clipping
from ssl_vit.training.clipping import clip_gradients, multiply_each
from tests.unit.methods.test_dino import dino

BLOCKS = 12


class Launches(TorchDispatchMode):
    """Kernels that a GPU is given, about: those for many tensors at once count once where they take
    all in one, as torch's want equal shapes, and as often as there are tensors elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        lists = [value for value in args if isinstance(value, list | tuple)]
        shapes = [[t.shape for t in some] for some in lists if isinstance(some[0], torch.Tensor)]
        together = all(of == shapes[0] for of in shapes)
        if function.namespace == "aten" and not function.is_view:
            self.count += 1 if together else len(shapes[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("spread", [1 << 16, 4])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_gradients_of_one_shape_at_once_have_the_same_bits(kind, spread, monkeypatch):
    """Of several shapes, one of which is there once, and one without numbers; larger ones than
    factors are spread to, or none."""
    monkeypatch.setattr(clipping, "_SPREAD", spread)
    torch.manual_seed(0)
    shapes = [(3, 4), (4,), (3, 4), (4, 3), (4,), (), (0, 4), (4,), (0, 4), ()]
    ours = [torch.randn(shape, dtype=kind) for shape in shapes]
    theirs = [gradient.clone() for gradient in ours]
    factors = torch.rand(len(shapes), dtype=kind)
    multiply_each(theirs, factors)
    monkeypatch.setattr(clipping, "_LOOPS", ())
    multiply_each(ours, factors)
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("clip_by", ["global", "network", "parameter"])
def test_kernels_of_clipping(clip_by):
    """Of DINO: as many as it has networks or shapes, not as it has parameters."""
    with without_memory():
        task = dino()
    options = OptimConfig(clip=1.0, clip_by=clip_by)
    with FakeTensorMode(allow_non_fake_inputs=True):
        trained = [
            nn.Parameter(torch.empty(p.shape, device="cuda"))
            for _ in range(BLOCKS)
            for p in task.parameters()
            if p.requires_grad
        ]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        names = ["encoder" if i % 2 else "head" for i in range(len(trained))]
        with Launches() as seen:
            assert clip_gradients(trained, options, names).device.type == "cuda"
    shapes = len({p.shape for p in trained})
    few = {"global": 8, "network": 14, "parameter": 9 + 2 * shapes}[clip_by]
    assert seen.count <= few < len(trained)
