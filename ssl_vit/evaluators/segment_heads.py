"""Segmentation heads: modules from feature maps to class logits, and how they are fitted frozen.

A head takes maps (B, D, h, w) of any size and returns logits (B, classes, h, w); what trains it
standardises the maps, and brings the logits to the size of the masks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.common.seeds import fold
from ssl_vit.evaluators.frozen import training_batches
from ssl_vit.evaluators.options import Head
from ssl_vit.evaluators.patch_heads import WEIGHT_DECAY, WHAT, patch_heads_loss
from ssl_vit.evaluators.tokens import Material
from ssl_vit.model.execution import repeatable_attention

_HIDDEN = 512
_HEAD_WIDTH, _MOST_HEADS = 64, 12
_LAYERS = 2
_STD = 0.02


class PerPatch(nn.Module):
    """Layers applied to each patch alone: a linear head, or an MLP with one hidden layer of 512.

    Matrix products, not convolutions by 1 x 1, whose gradients are summed in any order on CUDA.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, maps: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c h w"]:
        logits: Tensor = self.layers(maps.permute(0, 2, 3, 1))
        return logits.permute(0, 3, 1, 2)


class MaskTransformer(nn.Module):
    """Mask transformer of Segmenter (Strudel et al. 2021, arXiv 2105.05633, section 3.2).

    Two transformer blocks see the patches and a learned embedding of each class together. The
    logits are cosines of patches with classes, normalised over the classes of a patch. As wide as
    the maps, in heads of 64, up to 768; without dropout.
    """

    def __init__(self, width: int, classes: int, layers: int = _LAYERS) -> None:
        """``width``: of the maps; ``layers``: transformer blocks."""
        super().__init__()
        heads = min(_MOST_HEADS, max(1, width // _HEAD_WIDTH))
        inner = heads * _HEAD_WIDTH
        self.project = nn.Linear(width, inner)
        self.embedding = nn.Parameter(torch.zeros(1, classes, inner))
        self.blocks = nn.Sequential(*(Block(inner, heads, qkv_bias=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(inner)
        self.of_patches = nn.Linear(inner, inner, bias=False)
        self.of_classes = nn.Linear(inner, inner, bias=False)
        self.mask_norm = nn.LayerNorm(classes)
        self._initialize(inner)

    def _initialize(self, inner: int) -> None:
        """Truncated normal weights, zero biases; normal ones of variance 1/inner last."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=_STD)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        repeatable_attention(self)
        nn.init.trunc_normal_(self.embedding, std=_STD)
        for last in (self.of_patches, self.of_classes):
            nn.init.normal_(last.weight, std=inner**-0.5)

    def forward(self, maps: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c h w"]:
        n, (height, width) = len(maps), maps.shape[2:]
        patches = self.project(maps.flatten(2).mT)
        seen = self.norm(self.blocks(torch.cat([patches, self.embedding.expand(n, -1, -1)], 1)))
        patches, classes = seen[:, : height * width], seen[:, height * width :]
        patches = F.normalize(self.of_patches(patches), dim=-1)
        classes = F.normalize(self.of_classes(classes), dim=-1)
        logits: Tensor = self.mask_norm(patches @ classes.mT)
        return logits.mT.unflatten(2, (height, width))


def segmentation_head(kind: Head, width: int, classes: int) -> nn.Module:
    """Head of this kind for maps of ``width`` channels, with random weights."""
    if kind == "transformer":
        return MaskTransformer(width, classes)
    if kind == "mlp":
        return PerPatch(nn.Linear(width, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, classes))
    return PerPatch(nn.Linear(width, classes))


@dataclass(frozen=True)
class HeadModules:
    """Heads side by side, on tokens standardised by the training statistics."""

    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]
    modules: tuple[nn.Module, ...]
    classes: int

    def __len__(self) -> int:
        return len(self.modules)

    def standardised(self, tokens: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """Tokens of mean 0 and deviation 1 over the training images, in float32."""
        return (tokens - self.mean[:, None, None]) / self.std[:, None, None]

    def __call__(self, tokens: Float[Tensor, "b d h w"]) -> Float[Tensor, "b g c h w"]:
        """Class logits of all patches and heads."""
        made = self.standardised(tokens)
        return torch.stack([module(made) for module in self.modules], 1)


def fit_head_modules(
    kind: Head,
    material: Material,
    rows: Int64[Tensor, " n"],
    classes: int,
    rates: tuple[float, ...],
    epochs: int,
    ignore: int,
    seed: int,
) -> HeadModules:
    """Fit a head of this kind for each learning rate, as ``fit_patch_heads`` fits linear ones: all
    from the same weights, on the same batches, by the same schedule."""
    device, width = material.mean.device, len(material.mean)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 1))
        first = segmentation_head(kind, width, classes)
    modules = tuple(copy.deepcopy(first).to(device) for _ in rates)
    heads = HeadModules(material.mean, material.std, modules, classes)
    optimizers = [torch.optim.AdamW(m.parameters(), weight_decay=WEIGHT_DECAY) for m in modules]
    generator = torch.Generator().manual_seed(fold(seed, 1))
    for tokens, masks, factor in training_batches(material, rows, epochs, generator, WHAT):
        made = heads.standardised(tokens)
        for module, optimizer, rate in zip(modules, optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
            patch_heads_loss(module(made)[:, None], masks, ignore).sum().backward()
            optimizer.step()
    for module in modules:
        module.eval().requires_grad_(False)
    return heads
