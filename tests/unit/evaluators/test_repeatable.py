"""Scores that repeat on CUDA: by no operation whose sums have another order each time."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.evaluators import depth, knn
from ssl_vit.evaluators.attentive_head import AttentiveHead
from ssl_vit.evaluators.knn import summed_votes, votes_by_products
from ssl_vit.evaluators.linear import LinearProtocol, fit_linear_heads
from ssl_vit.evaluators.patch_heads import patch_heads_loss, upsampled
from ssl_vit.evaluators.segment_heads import MaskTransformer
from tests.unit.feature_sets import blobs, normal, tagged

# What torch.use_deterministic_algorithms says of CUDA, of operations that may occur in a score.
UNSTABLE = (
    "scatter_add",
    "scatter_reduce",
    "index_add",
    "index_put",
    "upsample_bilinear2d_backward",
    "upsample_linear1d_backward",
    "adaptive_avg_pool2d_backward",
    "embedding_dense_backward",
    "put_",
    "histc",
    "kthvalue",
    "median",
    "_scaled_dot_product",  # fused; of gradients alone, but where the CPU has it, CUDA has it, too
)


class Operations(TorchDispatchMode):
    """Names of what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__)
        return function(*args, **(kwargs or {}))


@contextmanager
def stable() -> Iterator[None]:
    """Inside, nothing unstable is computed; and something is."""
    with Operations() as seen:
        yield
    assert seen.names
    found = {name for name in seen.names if name.startswith(UNSTABLE)}
    assert not found


def test_votes():
    with FakeTensorMode():
        weight, label = torch.rand(50, 20, device="cuda"), torch.zeros(50, 20, device="cuda").long()
        with stable():
            assert summed_votes(weight, label, 7).shape == (50, 7)


@pytest.mark.parametrize("cells", [1, 300, 1 << 25])
def test_votes_by_products_are_the_votes(cells, monkeypatch):
    """In blocks of rows that hold at most so many numbers, at least one."""
    monkeypatch.setattr(knn, "_CELLS", cells)
    weight, label = normal(50, 20).exp(), torch.randint(0, 7, (50, 20))
    expected = summed_votes(weight, label, 7)
    torch.testing.assert_close(votes_by_products(weight, label, 7), expected)


def test_linear_heads():
    protocol = LinearProtocol(epochs=1, least_steps=3, batch_size=32)
    points = [("mean", 0.1), ("mean", 1.0)]
    for train in (blobs(64, 4, 6, 0.5, 0), tagged(64, 3, 1)):
        with stable():
            fit_linear_heads(train, points, protocol)


def test_patch_heads():
    logits = normal(2, 3, 5, 4, 6).requires_grad_()
    with stable():
        patch_heads_loss(logits, torch.randint(0, 5, (2, 16, 24)), 255).sum().backward()


@pytest.mark.parametrize(
    "head", [AttentiveHead(12, 3, 2, 3, False, 0), MaskTransformer(12, 3)], ids=["probe", "masks"]
)
def test_heads_with_attention(head):
    maps = normal(4, 5, 12) if isinstance(head, AttentiveHead) else normal(2, 12, 3, 4)
    with stable():
        head(maps).square().sum().backward()


def test_convolutions_of_the_depth_probe_are_in_float32():
    """And by one algorithm, whatever was set before."""
    before = torch.backends.cudnn.allow_tf32
    for set_before in (True, False):
        torch.backends.cudnn.allow_tf32 = set_before
        with depth._repeatable():
            assert not torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.deterministic
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.allow_tf32 == set_before
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("size", [(8, 6), (2, 9), (4, 3), (37, 50)])
def test_logits_are_upsampled_as_by_torch(size):
    """Values and gradients; down to fewer, too."""
    ours, theirs = (normal(2, 3, 4, 3).requires_grad_() for _ in range(2))
    found = upsampled(ours, size)
    expected = F.interpolate(theirs, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected)
    weights = normal(*found.shape, seed=1)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_features_stay_in_the_hosts_memory(monkeypatch):
    """Only rows of a batch are moved to the device, and a sample for the preconditioner."""
    monkeypatch.setattr("ssl_vit.evaluators.linear_heads._ROWS", 100)
    train, moved = blobs(1000, 4, 6, 0.5, 0), []

    class Moves(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and out.device.type == "meta":
                moved.append(tuple(out.shape))
            return out

    protocol = LinearProtocol(epochs=1, least_steps=4, batch_size=50)
    with Moves():
        heads = fit_linear_heads(train, [("mean", 0.1)], protocol, torch.device("meta"))
    assert heads["mean"].weight.device.type == "meta"
    features = [shape for shape in moved if len(shape) == 2 and shape[1] == 6]
    assert len(features) > 4
    assert max(rows for rows, _ in features) == 100
    assert train.parts["mean"].device.type == "cpu"
