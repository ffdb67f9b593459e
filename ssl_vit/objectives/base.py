"""Objective: a loss on an encoder that somebody else owns, so that several can share one."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor, nn

from ssl_vit.common.task import Scalar, Views
from ssl_vit.model.encoder import Encoder


class Objective(nn.Module):
    """Loss that a method minimises, with the networks that it needs beside the encoder.

    Attributes:
        explained: meaning of its scalars, by name.
    """

    explained: ClassVar[dict[str, Scalar]] = {}

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

    def encoder_replaced(self, encoder: Encoder) -> None:
        """Called when the encoder has been given other weights to begin with."""

    def before_update(self, step: int) -> None:
        """Called with gradients in place, before they are clipped and applied."""

    def after_update(self, encoder: Encoder, step: int, took: Bool[Tensor, ""]) -> None:
        """Called after the optimizer step; ``took`` is false, on every process, where the step was
        skipped: then nothing may move."""

    def concerns(self, means: dict[str, float]) -> dict[str, str]:
        """Problems of the training, by the means of its scalars over some steps: a short
        name, and a line with the usual remedies."""
        return {}
