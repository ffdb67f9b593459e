"""I-JEPA (Assran et al. 2023, arXiv 2301.08243): from one part of an image, the features of others
are predicted, as the encoder's own moving average finds them in the whole image."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.common.checks import check_heads, flag
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check
from ssl_vit.common.figures import picture_rows, to_rgb
from ssl_vit.common.task import Views, at_least_fp32
from ssl_vit.data.augment import ViewSpec, one_crop
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.order import Places
from ssl_vit.methods.base import Method
from ssl_vit.model.encoder import Encoder, take
from ssl_vit.model.init import truncated_init
from ssl_vit.model.positions import resampled, sincos_positions
from ssl_vit.objectives.base import Objective, Setting
from ssl_vit.objectives.context_blocks import ContextBlocks
from ssl_vit.objectives.ema import Teacher
from ssl_vit.objectives.masked_patches import Decoder, without_data
from ssl_vit.options.base import Defaults
from ssl_vit.options.ijepa import DEFAULTS, EXPLAINED, TITLE, IJEPAConfig

# Targets whose deviation between images is below this, of 1, are alike; not checked on few images.
_COLLAPSED, _ENOUGH_IMAGES = 0.05, 8
# Less of an image is little to predict the rest from; of 14 x 14 patches it is 0.29.
_LITTLE = 0.15


def blocks(config: IJEPAConfig, grid: tuple[int, int]) -> ContextBlocks:
    """Context and target blocks on a grid of patches.

    Raises:
        UserError: target blocks may leave nothing of the context.
    """
    found = ContextBlocks(
        grid, config.targets, config.target_scale, config.target_aspect, config.context_scale
    )
    check(
        found.kept > 0,
        f"{config.targets} target blocks of {config.target_scale[1]:g} of the image leave nothing "
        f"of the context in a grid of {grid[0]}x{grid[1]} patches: lower "
        f"{flag(config, 'target_scale')} or {flag(config, 'targets')}, or take smaller patches",
    )
    return found


def heads(config: IJEPAConfig, encoder: Encoder) -> int:
    """Attention heads of the predictor.

    Raises:
        UserError: they do not divide its width.
    """
    heads = config.predictor_heads or encoder.vit.blocks[0].attn.num_heads
    check_heads(config, "predictor_heads", "predictor_width", heads)
    return int(heads)


class IJEPAObjective(Objective):
    """Smooth L1 between predicted features of target blocks and those of the teacher.

    For an image, a target block and a patch of it: the mean over features of smooth L1 (quadratic
    up to 1) between the prediction and the teacher's output for the patch, of the whole image,
    layer-normalised; the loss is the mean of these. In a batch with missing pixels patches without
    data are no targets.
    """

    def __init__(self, config: IJEPAConfig, encoder: Encoder) -> None:
        super().__init__()
        encoder.check_apart()
        self.config, self.grid = config, encoder.grid
        blocks(config, encoder.grid)
        self.predictor = Decoder(
            encoder.width,
            config.predictor_width,
            config.predictor_depth,
            heads(config, encoder),
            encoder.grid,
            encoder.width,
        )
        self.images = 0
        self.set_length(1, 1)

    def add_teacher(self, encoder: Encoder) -> None:
        """Copy the encoder, whose first weights are drawn by now."""
        self.teacher = Teacher(encoder)

    def encoder_replaced(self, encoder: Encoder) -> None:
        """Encoder and teacher start equal."""
        self.teacher.start_from(encoder)

    def set_length(self, steps: int, steps_per_epoch: int) -> None:
        """The number of steps in which the teacher's momentum rises to 1."""
        self.steps = steps

    def momentum(self, step: int) -> float:
        """The share of itself that the teacher keeps at a step, counted from 0."""
        return self.config.momentum + (1 - self.config.momentum) * step / self.steps

    def forward(self, encoder: Encoder, views: Views, step: int) -> dict[str, Tensor]:
        """The loss of a batch, and how far its targets are spread."""
        images, drawn = views.crops[0], views.drawn
        self.images = len(images)
        seen = self.targets(images)
        wanted = take(seen, drawn["targets"].flatten(1)).unflatten(1, drawn["targets"].shape[1:])
        found = self.predict(encoder, images, drawn["context"], drawn["targets"], drawn["inside"])
        weights = self._weights(encoder, views)
        spread = seen.var(0, unbiased=False).mean().sqrt()
        return {"loss": smooth_l1(found, wanted, weights), "target_spread": spread}

    @torch.no_grad()
    def targets(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """The teacher's output for all patches of whole images, layer-normalised."""
        patches = at_least_fp32(self.teacher.encoder(images).patches)
        return F.layer_norm(patches, patches.shape[-1:])

    def predict(
        self,
        encoder: Encoder,
        images: Float[Tensor, "b c h w"],
        context: Int64[Tensor, "b k"],
        targets: Int64[Tensor, "b t m"],
        inside: Bool[Tensor, " m"] | None = None,
    ) -> Float[Tensor, "b t m d"]:
        """Features of the target blocks' patches, of which the encoder sees the context alone.

        ``inside``: False where ``targets`` is padding, which nothing attends to; None: nowhere.
        """
        latent = encoder.encode(encoder.embed(images, keep=context))
        count, prefix = targets.shape[1], encoder.vit.num_prefix_tokens
        order = torch.cat([context.repeat_interleave(count, dim=0), targets.flatten(0, 1)], dim=1)
        there = None
        if inside is not None:
            there = torch.cat([inside.new_ones(latent.shape[1]), inside])
        tokens = self.predictor(latent, order, prefix, masked_only=True, attended=there)
        return at_least_fp32(self.predictor.predict(tokens)).unflatten(0, (-1, count))

    @staticmethod
    @torch.no_grad()
    def _weights(encoder: Encoder, views: Views) -> Float[Tensor, "b t m"]:
        """1 for what counts of the target blocks; 0 for padding, and patches without data."""
        targets, inside = views.drawn["targets"], views.drawn["inside"]
        counted = inside.expand(targets.shape)
        missing = views.missing_of(0)
        if missing is not None:
            valid = ~without_data(encoder.patchify(~missing))
            counted = counted & valid.gather(1, targets.flatten(1)).view(targets.shape)
        return counted.to(views.crops[0].dtype)

    def concerns(self, means: dict[str, float]) -> dict[str, str]:
        """Targets that are alike for all images: their places alone are then predicted."""
        spread = means["target_spread"]
        if spread >= _COLLAPSED or self.images < _ENOUGH_IMAGES:
            return {}
        return {
            "collapse": f"the targets are alike for all images (spread {spread:.3f} of 1), so "
            "there is nothing to learn. Usual remedies: a lower --optim.lr, a longer "
            f"--optim.warmup, a higher {flag(self.config, 'momentum')}"
        }

    def advice(self, setting: Setting) -> list[str]:
        """A context of few patches, as in a coarse grid."""
        c, kept, patches = self.config, blocks(self.config, self.grid).kept, math.prod(self.grid)
        if kept >= _LITTLE * patches:
            return []
        return [
            f"the encoder sees {kept} of {patches} patches, little to predict others from: take "
            f"a smaller --encoder.patch-size, or lower {flag(c, 'targets')} or "
            f"{flag(c, 'target_scale')}"
        ]

    def fill_buffers(self, encoder: Encoder) -> None:
        """The predictor's fixed positions."""
        self.predictor.positions = sincos_positions(encoder.grid, self.config.predictor_width)

    def take_tables(self, other: Objective, encoder: Encoder) -> None:
        """The predictor's positions, resampled."""
        assert isinstance(other, IJEPAObjective)
        table = other.predictor.positions[None]
        self.predictor.positions = resampled(table, other.grid, self.grid, "timm")[0]

    def after_update(self, encoder: Encoder, step: int, took: Bool[Tensor, ""]) -> None:
        """Move the teacher."""
        self.teacher.follow(encoder, None, self.momentum(step), took)


def smooth_l1(
    found: Float[Tensor, "b t m d"],
    wanted: Float[Tensor, "b t m d"],
    weights: Float[Tensor, "b t m"],
) -> Float[Tensor, ""]:
    """Weighted mean of smooth L1 (beta 1) over patches; 0 where nothing counts."""
    each = F.smooth_l1_loss(found, wanted, reduction="none").mean(-1)
    return (each * weights).sum() / weights.sum().clamp(min=1)


class IJEPA(Method):
    """Predicts features of target blocks from a context block; the targets are the teacher's."""

    Config: ClassVar[type] = IJEPAConfig
    title, explained = TITLE, EXPLAINED
    progress: ClassVar[tuple[str, ...]] = ("target_spread",)
    defaults: ClassVar[Defaults] = DEFAULTS

    def __init__(self, config: IJEPAConfig, encoder_config: EncoderConfig, channels: int) -> None:
        super().__init__(config, encoder_config, channels)
        objective = IJEPAObjective(config, self.encoder)
        truncated_init(self.encoder, objective.predictor)
        nn.init.trunc_normal_(objective.predictor.mask_token, std=0.02)
        objective.add_teacher(self.encoder)
        self.add("ijepa", objective)

    @staticmethod
    def views(config: IJEPAConfig, encoder: Encoder) -> ViewSpec:
        """One random resized crop, perhaps flipped and turned; its colours stay as they are."""
        return one_crop(encoder.image_size, config)

    @staticmethod
    def draw_together(
        config: IJEPAConfig, grid: tuple[int, int], places: Places
    ) -> dict[str, np.ndarray]:
        """Context and target blocks: see :meth:`ContextBlocks.draw`."""
        return blocks(config, grid).draw(places)

    def exported_encoder(self) -> Encoder:
        """The teacher's, which the paper evaluates."""
        encoder: Encoder = self.objective.teacher.encoder
        return encoder

    def panels(self, views: Views, normalize: Normalize) -> dict[str, np.ndarray]:
        """Context and target blocks as they may be drawn for these images."""
        encoder, images = self.encoder, views.crops[0]
        drawn, shown = self.drawn(views.keys), normalize.inverse(images)
        blocks = [drawn["context"], *drawn["targets"][:, :, drawn["inside"]].unbind(1)]
        titles = ["context", *(f"target {i + 1}" for i in range(len(blocks) - 1))]
        patches, columns = encoder.patchify(shown), {"image": to_rgb(shown)}
        for title, block in zip(titles, blocks, strict=True):
            hidden = torch.ones_like(patches[:, :, 0], dtype=torch.bool).scatter(1, block, False)
            gray = patches.masked_fill(hidden[:, :, None], 0.5)
            columns[title] = to_rgb(encoder.unpatchify(gray, encoder.grid))
        caption = (
            "Blocks such as are drawn in training. The encoder sees the context; the teacher sees "
            "the whole image, and what it finds in each target block is predicted."
        )
        return {"blocks": picture_rows(columns, caption, wrap=6)}
