"""Patch heads: linear heads on frozen patch tokens, trained together on the classes of pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.common.seeds import fold
from ssl_vit.evaluators.frozen import training_batches
from ssl_vit.evaluators.tokens import Material

WEIGHT_DECAY = 1e-4
WHAT = "segmentation probe"


@dataclass(frozen=True)
class PatchHeads:
    """Patch heads: ``g`` linear layers on tokens standardised by the training statistics."""

    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]
    weight: Float[Tensor, "g d c"]
    bias: Float[Tensor, "g c"]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.bias.shape[1]

    def __len__(self) -> int:
        return len(self.bias)

    def __call__(self, tokens: Float[Tensor, "b d h w"]) -> Float[Tensor, "b g c h w"]:
        """Class logits of all patches and heads, in one matrix product."""
        heads, _, classes = self.weight.shape
        joined = self.weight.transpose(0, 1).flatten(1)
        x = (tokens.permute(0, 2, 3, 1) - self.mean) / self.std
        logits = x @ joined + self.bias.flatten()
        return logits.permute(0, 3, 1, 2).unflatten(1, (heads, classes))


def upsampled(logits: Float[Tensor, "n c h w"], size: tuple[int, int]) -> Float[Tensor, "n c r s"]:
    """Logits upsampled bilinearly between patch centres.

    As products with two matrices: on CUDA the gradient of torch's own is summed in any order, and
    no score would repeat.
    """
    down, right = (
        _between_centres(old, new, logits) for old, new in zip(logits.shape[2:], size, strict=True)
    )
    return down.mT @ (logits @ right)


def _between_centres(old: int, new: int, like: Tensor) -> Float[Tensor, "{old} {new}"]:
    """Weights of ``old`` values at ``new`` places evenly spaced over the same length."""
    unit = torch.eye(old, device=like.device, dtype=like.dtype)
    return F.interpolate(unit[None], new, mode="linear", align_corners=False)[0]


def patch_heads_loss(
    logits: Float[Tensor, "b g c h w"], masks: Int64[Tensor, "b r s"], ignore: int
) -> Float[Tensor, " g"]:
    """Cross-entropy of each head, mean over pixels that have a class; 0 if none has."""
    n, heads = logits.shape[:2]
    fine = upsampled(logits.flatten(0, 1), (masks.shape[1], masks.shape[2]))
    target = masks.repeat_interleave(heads, 0)
    losses = F.cross_entropy(fine, target, ignore_index=ignore, reduction="none")
    valid = (masks != ignore).sum().clamp(min=1)
    return losses.view(n, heads, -1).sum((0, 2)) / valid


def fit_patch_heads(
    material: Material,
    rows: Int64[Tensor, " n"],
    classes: int,
    rates: tuple[float, ...],
    epochs: int,
    ignore: int,
    seed: int,
) -> PatchHeads:
    """Fit a head for each learning rate, all on the same batches of the images ``rows``.

    AdamW, weight decay 1e-4, linear warm-up over a tenth, then half a cosine to 0. Tokens are
    standardised by their exact statistics, not by those of a batch; the loss is computed at 4 x 4
    pixels per patch; images are not augmented. SGD with momentum gave the same scores.
    """
    generator = torch.Generator().manual_seed(fold(seed, 1))
    width, device = len(material.mean), material.mean.device
    start = 0.01 * torch.randn(width, classes, generator=generator)
    # Separate parameters, so that each has its rate; Adam is elementwise.
    weights = [start.to(device, copy=True).requires_grad_() for _ in rates]
    biases = [torch.zeros(classes, device=device, requires_grad=True) for _ in rates]
    groups: list[dict[str, Any]] = [
        {"params": [w, b], "lr": 0.0} for w, b in zip(weights, biases, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    for tokens, masks, factor in training_batches(material, rows, epochs, generator, WHAT):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        heads = PatchHeads(material.mean, material.std, torch.stack(weights), torch.stack(biases))
        optimizer.zero_grad()
        # Sum over heads: each head's gradient is that of its own mean loss.
        patch_heads_loss(heads(tokens), masks, ignore).sum().backward()
        optimizer.step()
    trained = torch.stack(weights).detach(), torch.stack(biases).detach()
    return PatchHeads(material.mean, material.std, *trained)
