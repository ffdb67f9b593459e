"""Objective: a loss on an encoder that somebody else owns, so that several can share one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from ssl_vit.common.figures import picture_rows
from ssl_vit.common.task import Views
from ssl_vit.data.normalize import Normalize
from ssl_vit.model.encoder import Encoder
from ssl_vit.options.base import Target


@dataclass(frozen=True)
class Setting:
    """Training setting of a method, as a preflight has found it.

    ``images``: of the training set. ``batch_size``: of a step, over all processes and ``parts``.
    ``lacking``: bytes of memory that a process would need beside what there is; 0: it fits.
    ``per_crop``: bytes that one crop of the most numerous kind takes, for all images that go
    through at once; 0: unknown.
    """

    images: int
    batch_size: int
    parts: int
    lacking: float = 0.0
    per_crop: float = 0.0


@dataclass(frozen=True)
class Reconstruction:
    """Masked images and what a method predicts of them: (b, h, w, 3) pictures by name, with a
    caption that states the target and how it is known."""

    pictures: dict[str, UInt8[np.ndarray, "b h w 3"]]
    caption: str

    def panel(self) -> dict[str, np.ndarray]:
        """Rows of original, masked image, and reconstruction with the visible patches pasted in."""
        shown = {name: p for name, p in self.pictures.items() if name != "prediction"}
        return {"reconstruction": picture_rows(shown, self.caption)}


class Objective(nn.Module):
    """Loss that a method minimises, with the networks that it needs beside the encoder."""

    def forward(self, encoder: Encoder, views: Views, step: int) -> dict[str, Tensor]:
        """Scalars on the device, among them ``loss``, which is minimised."""
        raise NotImplementedError

    def fill_buffers(self, encoder: Encoder) -> None:
        """Compute what is not in a state dict (tables of fixed positions) anew."""

    def take_tables(self, other: Objective, encoder: Encoder) -> None:
        """Take what is not in a state dict from ``other``, the same objective on ``encoder``,
        whose grid of patches is another."""

    def set_length(self, steps: int, steps_per_epoch: int) -> None:
        """Called before the first step: how long the training will be."""

    def set_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Called before the first step: mean and deviation of each channel by which views are
        normalised."""

    def encoder_replaced(self, encoder: Encoder) -> None:
        """Called when the encoder has been given other weights to begin with."""

    def before_update(self, step: int) -> None:
        """Called with gradients in place, before they are clipped and applied."""

    def after_update(self, encoder: Encoder, step: int, took: Bool[Tensor, ""]) -> None:
        """Called after the optimizer step; ``took`` is false, on every process, where the step was
        skipped: then nothing may move."""

    def advice(self, setting: Setting) -> list[str]:
        """Advice on the options in this setting: lines with the remedy."""
        return []

    def concerns(self, means: dict[str, float]) -> dict[str, str]:
        """Problems of the training, by the means of its scalars over some steps: a short
        name, and a line with the usual remedies."""
        return {}

    def reconstruct(
        self,
        encoder: Encoder,
        images: Float[Tensor, "b c h w"],
        keys: Int64[Tensor, " b"],
        normalize: Normalize,
        mask_ratio: float = 0.0,
        target: Target = "auto",
        missing: Bool[Tensor, "b c h w"] | None = None,
    ) -> Reconstruction:
        """Masked images and what is predicted of them, where it can.

        Args:
            images: normalised; the inverse of ``normalize`` shows them.
            keys: what the masks are drawn from.
            mask_ratio: share of the patches to hide. 0: as it was trained.
            target: what its predictions are; auto: as it was trained, where that is known.
            missing: where the images have no data; None: nowhere.

        Raises:
            UserError: a ratio or a target that it cannot show.
        """
        raise NotImplementedError
