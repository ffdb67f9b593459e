"""Gram anchoring: similarities between an image's patches stay those of an older teacher
(Siméoni et al. 2025, arXiv 2508.10104, section 4)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.common.task import at_least_fp32
from ssl_vit.model.encoder import Encoder, Features
from ssl_vit.objectives.ema import Teacher, copy_weights


def resized_patches(
    patches: Float[Tensor, "b m d"], grid: tuple[int, int], size: tuple[int, int]
) -> Float[Tensor, "b n d"]:
    """Patch features of ``grid`` (rows, columns) resized to ``size``: bicubic, not antialiased."""
    if grid == size:
        return patches
    maps = patches.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.interpolate(maps, size=size, mode="bicubic").flatten(2).transpose(1, 2)


def gram_loss(
    student: Float[Tensor, "b n d"],
    teacher: Float[Tensor, "b n d"],
    *,
    normalize: bool = True,
    per_image: bool = True,
    negatives: Literal["kept", "zero", "teacher's zero"] = "kept",
) -> Float[Tensor, ""]:
    """Mean squared difference of the similarities of all pairs of patches.

    Args:
        normalize: similarities are cosines, not inner products.
        per_image: pairs are of one image; else of the whole batch.
        negatives: negative similarities are kept, or count as 0, or the teacher's alone do.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = at_least_fp32(student), at_least_fp32(teacher)
        if normalize:
            student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        if not per_image:
            student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        own, wanted = student @ student.mT, teacher @ teacher.mT
        own = own.clamp(min=0) if negatives == "zero" else own
        wanted = wanted if negatives == "kept" else wanted.clamp(min=0)
        return F.mse_loss(own, wanted)


class Anchor(Teacher):
    """Gram anchoring: an encoder that stays while the student learns, and sees larger crops.

    Its weights are those it is given; or they are taken from the training's own teacher when the
    anchoring begins, ``start`` steps on. With ``interval`` they are taken anew every so many steps.
    """

    start, interval, given = 0, 0, False

    def loss(self, seen: Features, large: Float[Tensor, "b c h w"], step: int) -> Float[Tensor, ""]:
        """Gram loss of a student's patches, of which this sees the crops as ``large``; 0 before it
        begins."""
        if step < self.start:
            return seen.patches.new_zeros(())
        with torch.no_grad():
            older = self.encoder(large)
            target = resized_patches(older.patches, older.grid, seen.grid)
        return gram_loss(seen.patches, target)

    def renew(self, teacher: Encoder, steps: int) -> None:
        """Take the weights of the training's own teacher, if it is time after so many steps."""
        begun = steps - self.start
        first = begun == 0 and not self.given
        if first or (begun > 0 and self.interval and begun % self.interval == 0):
            copy_weights(self.encoder, teacher)
