"""Device half of an augmentation: whole batches as float, changed in colour, standardised."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_vit.common.task import Views
from ssl_vit.data.levels import levels
from ssl_vit.data.photometric import WIDTH, photometric


class Normalize(nn.Module):
    """The device half: images as float, scaled to 0..1 where they are uint8, and standardised.

    Photometric operations, where a batch of views has parameters for them, come before the last,
    and levels after it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], bounded: bool = True
    ) -> None:
        super().__init__()
        self.bounded = bounded
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def images(self, images: Tensor) -> Float[Tensor, "b c h w"]:
        """Normalised images from uint8 (0..255) or float ones; missing pixels (NaN) become 0."""
        made = self._standardised(_scaled(images))
        if not images.is_floating_point():
            return made
        return made.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)

    def inverse(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalised images back to their own scale (0..1 for uint8)."""
        return images * self.std + self.mean

    def forward(self, views: Views) -> Views:
        """The same batch with its crops augmented, by what parameters there are, and normalised;
        pixels that are missing are 0.

        ``bounded`` says whether the data set's images lie in 0..1, and photometric operations have
        to keep them there; it is no matter of a batch, where 8-bit images may meet deeper ones.
        """
        none: list[None] = [None] * len(views.crops)
        found = zip(views.crops, views.photometric or none, views.missing or none, strict=True)
        return replace(views, crops=[self._crops(*kind) for kind in found], photometric=[])

    def _crops(
        self, images: Tensor, parameters: Tensor | None, missing: Tensor | None
    ) -> Float[Tensor, "b c h w"]:
        """Crops of one kind; those without data are the mean from the beginning, for photometric
        operations spread it, and again after them."""
        scaled = _scaled(images)
        if missing is not None:
            scaled = torch.where(missing, self.mean, scaled).contiguous()
        if parameters is not None and parameters.shape[1]:
            scaled = photometric(scaled, parameters[:, :WIDTH], bounded=self.bounded)
        made = self._standardised(scaled)
        if parameters is not None and parameters.shape[1] > WIDTH:
            made = levels(made, parameters[:, WIDTH:])
        return made if missing is None else made.masked_fill_(missing, 0.0)

    def _standardised(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Overwrites ``images``: none of this is worth another pass over memory."""
        return images.sub_(self.mean).div_(self.std)


def _scaled(images: Tensor) -> Float[Tensor, "b c h w"]:
    """A float32 copy, in 0..1 if the images are uint8.

    From workers they come pixel by pixel; what follows is faster on channel after channel.
    """
    copy = images.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return copy.mul_(1 / 255) if images.dtype == torch.uint8 else copy
