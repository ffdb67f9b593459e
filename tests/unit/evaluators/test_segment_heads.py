"""Segmentation heads: logits against loops of their definitions, and fitting that repeats."""

import math

import pytest
import torch
from torch import Tensor

from ssl_vit.evaluators.segment_heads import MaskTransformer, fit_head_modules, segmentation_head
from tests.unit.evaluators.test_repeatable import stable
from tests.unit.evaluators.test_segment import backbone, data, made, run, seeded

__all__ = ["data", "made"]


def normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalisation of one vector."""
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return (x - mean) / (variance + eps) ** 0.5 * weight + bias


def gelu(x: Tensor) -> Tensor:
    return torch.stack([v * 0.5 * (1 + math.erf(float(v) / 2**0.5)) for v in x])


def attended(tokens: list[Tensor], state: dict[str, Tensor], heads: int) -> list[Tensor]:
    """Self-attention, one token and one head at a time."""
    width = len(tokens[0])
    size = width // heads
    joined = [state["attn.qkv.weight"] @ t + state["attn.qkv.bias"] for t in tokens]
    found = []
    for own in joined:
        parts = []
        for h in range(heads):
            q = own[h * size : (h + 1) * size]
            keys = [o[width + h * size : width + (h + 1) * size] for o in joined]
            values = [o[2 * width + h * size : 2 * width + (h + 1) * size] for o in joined]
            weights = torch.stack([(q * k).sum() / size**0.5 for k in keys]).exp()
            parts.append(sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True)))
        found.append(state["attn.proj.weight"] @ torch.cat(parts) + state["attn.proj.bias"])
    return found


def masks_by_loop(head: MaskTransformer, maps: Tensor, heads: int) -> Tensor:
    """Section 3.2 of Strudel et al. 2021: of one image (d, h, w), patch by patch."""
    state = head.state_dict()
    _, height, width = maps.shape
    project = state["project.weight"], state["project.bias"]
    tokens = [project[0] @ maps[:, i, j] + project[1] for i in range(height) for j in range(width)]
    patches = len(tokens)
    tokens += list(state["embedding"][0])
    for n in range(len(head.blocks)):
        own = {k.removeprefix(f"blocks.{n}."): v for k, v in state.items() if f"blocks.{n}." in k}
        eps = head.blocks[n].norm1.eps
        seen = [normed(t, own["norm1.weight"], own["norm1.bias"], eps) for t in tokens]
        tokens = [t + a for t, a in zip(tokens, attended(seen, own, heads), strict=True)]
        for i, token in enumerate(tokens):
            inner = normed(token, own["norm2.weight"], own["norm2.bias"], eps)
            inner = gelu(own["mlp.fc1.weight"] @ inner + own["mlp.fc1.bias"])
            tokens[i] = token + own["mlp.fc2.weight"] @ inner + own["mlp.fc2.bias"]
    tokens = [normed(t, state["norm.weight"], state["norm.bias"]) for t in tokens]
    of_patches = [state["of_patches.weight"] @ t for t in tokens[:patches]]
    of_classes = [state["of_classes.weight"] @ t for t in tokens[patches:]]
    logits = torch.zeros(len(of_classes), height, width)
    for place, patch in enumerate(of_patches):
        cosines = [(patch * c).sum() / (patch.norm() * c.norm()) for c in of_classes]
        own = normed(torch.stack(cosines), state["mask_norm.weight"], state["mask_norm.bias"])
        logits[:, place // width, place % width] = own
    return logits


def test_masks_are_the_loop_of_their_definition():
    torch.manual_seed(0)
    head = MaskTransformer(128, 3).eval()  # two heads of 64
    torch.nn.init.normal_(head.embedding)
    maps = torch.randn(2, 128, 2, 3, generator=seeded())
    with torch.no_grad():
        found = head(maps)
        for image, own in zip(maps, found, strict=True):
            expected = masks_by_loop(head, image, 2)
            torch.testing.assert_close(own, expected, atol=2e-4, rtol=2e-4)
    assert found.shape == (2, 3, 2, 3)


@pytest.mark.parametrize(("width", "inner"), [(3, 64), (192, 192), (768, 768), (3072, 768)])
def test_a_mask_transformer_is_as_wide_as_the_maps_within_reason(width, inner):
    with torch.device("meta"):
        assert MaskTransformer(width, 5).norm.weight.shape == (inner,)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_heads_of_patches_see_one_patch_each(kind):
    torch.manual_seed(0)
    head = segmentation_head(kind, 5, 4)
    maps = torch.randn(2, 5, 3, 2, generator=seeded())
    found = head(maps)
    state = head.state_dict()
    for i in range(3):
        for j in range(2):
            x = state["layers.0.weight"] @ maps[1, :, i, j] + state["layers.0.bias"]
            if kind == "mlp":
                x = state["layers.2.weight"] @ gelu(x) + state["layers.2.bias"]
            torch.testing.assert_close(found[1, :, i, j], x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_heads_side_by_side_are_heads_one_by_one(made, kind):
    """From the same weights, on the same batches; and by no global random numbers."""
    rows, rates = torch.arange(20), (0.0003, 0.003)
    torch.manual_seed(1)
    both = fit_head_modules(kind, made, rows, 3, rates, 2, 255, 0)
    torch.manual_seed(2)
    tokens = torch.randn(2, 5, 2, 3, generator=seeded())
    for i, rate in enumerate(rates):
        alone = fit_head_modules(kind, made, rows, 3, (rate,), 2, 255, 0)
        assert torch.equal(both(tokens)[:, i], alone(tokens)[:, 0])
    other = fit_head_modules(kind, made, rows, 3, rates, 2, 255, 1)
    assert not torch.equal(both(tokens), other(tokens))
    assert (both(tokens)[:, 0] - both(tokens)[:, 1]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_textures_are_learned_by_every_head(tmp_path, data, kind):
    """The rate is one of those for heads of several layers, and the card says which head."""
    score, card = run(backbone(tmp_path), *data, head=kind, epochs=15)
    assert score.metrics["miou"] > 75
    assert score.setting in ("lr=0.0001", "lr=0.0003", "lr=0.001", "lr=0.003")
    assert {"mlp": "MLP", "transformer": "Strudel"}[kind] in card["probe"]["head"]


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_gradients_of_heads_repeat_on_a_gpu(kind):
    """No operation whose sums have another order each time."""
    with torch.device("meta"):
        head, maps = segmentation_head(kind, 64, 5), torch.zeros(2, 64, 3, 4)
    with stable():
        head(maps).sum().backward()
