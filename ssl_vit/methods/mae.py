"""MAE: masked autoencoder (He et al. 2022, arXiv 2111.06377)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check
from ssl_vit.common.seeds import uniform
from ssl_vit.common.task import Views, at_least_fp32
from ssl_vit.data.augment import ViewSpec, one_crop
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods.base import Method
from ssl_vit.model.architecture import set_norm_eps
from ssl_vit.model.encoder import Encoder, take
from ssl_vit.model.init import xavier_init
from ssl_vit.model.positions import resampled, sincos_positions
from ssl_vit.objectives.base import Objective, Reconstruction
from ssl_vit.objectives.masked_patches import (
    Decoder,
    explained_shares,
    masked_pictures,
    mean_of_valid,
    patch_statistics,
    visible_first,
)
from ssl_vit.options.base import Defaults, Target
from ssl_vit.options.mae import DEFAULTS, EXPLAINED, TITLE, MAEConfig
from ssl_vit.weights.decoders import read_decoder
from ssl_vit.weights.exchange import load_strictly

log = logging.getLogger("ssl_vit")


class MAEObjective(Objective):
    """Mean squared error of the masked patches' pixels, of which the encoder sees the others.

    ``target_known_from``: where it is stated whether the target is normalised; empty if nowhere.
    """

    def __init__(self, config: MAEConfig, encoder: Encoder) -> None:
        super().__init__()
        encoder.check_apart()
        self.config, self.grid = config, encoder.grid
        self.target_known_from = "normalize_target in its config.yaml"
        self.n_visible = config.visible(encoder.grid[0] * encoder.grid[1])
        self.decoder = Decoder(
            encoder.width,
            config.decoder_width,
            config.decoder_depth,
            config.decoder_heads,
            encoder.grid,
            encoder.patch_size**2 * encoder.channels,
        )

    def forward(self, encoder: Encoder, views: Views, step: int) -> dict[str, Tensor]:
        """The loss of a batch, each image masked by its own key."""
        noise = self.noise(views.keys)
        return {"loss": self.loss(encoder, views.crops[0], noise, views.missing_of(0))}

    def noise(self, keys: Int64[Tensor, " b"]) -> Float[Tensor, "b n"]:
        """Noise that decides which patches of images with these keys are kept."""
        return uniform(keys, self.grid[0] * self.grid[1])

    def loss(
        self,
        encoder: Encoder,
        images: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b n"],
        missing: Bool[Tensor, "b c h w"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean squared error of the masked patches' pixels, in this part of the batch.

        ``noise`` decides what is kept: the patches with the ``n_visible`` smallest numbers, those
        without data last. Pixels that are ``missing`` (None: none) are no target, nor is a patch
        too few of whose pixels are there; the loss is 0 where nothing is.
        """
        valid = None if missing is None else encoder.patchify(~missing)
        order = visible_first(noise, valid)
        # What the loss does not use is not computed: it is of masked patches.
        tokens = self.decode(encoder, images, order, self.n_visible, masked_only=True)
        prediction = at_least_fp32(self.decoder.predict(tokens))
        masked = order[:, self.n_visible :]
        patches = take(encoder.patchify(images), masked)
        if valid is None:
            return (prediction - self.target(patches)).square().mean()
        valid = take(valid, masked)
        if self.config.normalize_target:  # a value alone has no variance
            valid = valid & (valid.sum(-1, keepdim=True) > 1)
        return mean_of_valid((prediction - self.target(patches, valid)).square(), valid)

    def decode(
        self,
        encoder: Encoder,
        images: Float[Tensor, "b c h w"],
        order: Int64[Tensor, "b n"],
        visible: int,
        masked_only: bool = False,
    ) -> Float[Tensor, "b k d"]:
        """Decoder tokens of all patches, or of the masked ones alone, in ``order``, of which the
        encoder sees the first ``visible``."""
        latent = encoder.encode(encoder.embed(images, order[:, :visible]))
        return self.decoder(latent, order, encoder.vit.num_prefix_tokens, masked_only)

    def target(
        self, patches: Float[Tensor, "b n ppc"], valid: Bool[Tensor, "b n ppc"] | None = None
    ) -> Float[Tensor, "b n ppc"]:
        """Target of patches: their pixels; normalised by the mean and unbiased variance of each
        patch's own valid values (None: all are) if so set."""
        if not self.config.normalize_target:
            return patches
        mean, std = patch_statistics(patches, valid)
        return (patches - mean) / std

    def predict(
        self,
        encoder: Encoder,
        images: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b n"],
        visible: int | None = None,
        valid: Bool[Tensor, "b n ppc"] | None = None,
    ) -> tuple[Float[Tensor, "b n ppc"], Float[Tensor, "b n"]]:
        """Predictions for all patches in image order, and the mask (1 where masked); ``visible``:
        how many patches the encoder sees, if not as many as in training; ``valid``: as for
        ``visible_first``."""
        visible = visible or self.n_visible
        order = visible_first(noise, valid)
        tokens = self.decode(encoder, images, order, visible)
        restore = order.argsort(dim=1)
        masked = torch.arange(order.shape[1], device=order.device)[None] >= visible
        mask = masked.expand_as(order).gather(1, restore).to(noise.dtype)
        return at_least_fp32(self.decoder.predict(take(tokens, restore))), mask

    @torch.no_grad()
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
        """Masked images and what is predicted of them; arguments are those of a method's.

        A normalised target is brought back to pixels with each patch's true mean and standard
        deviation. Where the target is not stated, it is the one of the two by which the prediction
        explains more of these very images' masked patches.
        """
        noise = self.noise(keys)
        n = noise.shape[1]
        visible = self.config.visible(n, mask_ratio)
        valid = None if missing is None else encoder.patchify(~missing)
        prediction, mask = self.predict(encoder, images, noise, visible, valid)
        hidden, patches = mask > 0, encoder.patchify(images)
        normalized, why = self._target(patches, prediction, hidden, target, valid)
        if normalized:
            mean, std = patch_statistics(patches, valid)
            prediction = prediction * std + mean
        caption = (
            f"{self._target_shown(normalized)} ({why}). {n - visible} of {n} patches are masked. "
            "prediction: all patches as predicted, of which training knows the masked ones only; "
            "reconstruction: the visible patches as they are, the masked ones as predicted."
        )
        pictures = masked_pictures(encoder, images, prediction, hidden, normalize, missing)
        return Reconstruction(pictures, caption)

    def _target(
        self,
        patches: Tensor,
        prediction: Tensor,
        hidden: Tensor,
        asked: Target,
        valid: Tensor | None,
    ) -> tuple[bool, str]:
        """True for a normalised target, and how that is known."""
        if asked != "auto":
            return asked == "normalized", f"as given by --target {asked}"
        if self.target_known_from:
            return self.config.normalize_target, f"as given by {self.target_known_from}"
        shares = explained_shares(patches, prediction, hidden, valid)
        why = (
            "the file does not state it; decided on these images: of their masked patches "
            f"the prediction explains {_percent(shares['normalized'])} as normalised patches and "
            f"{_percent(shares['pixels'])} as raw pixels"
        )
        return shares["normalized"] >= shares["pixels"], why

    @staticmethod
    def _target_shown(normalized: bool) -> str:
        """Caption of the target, and how it is made pixels."""
        if normalized:
            return "target: normalised patches, shown with each patch's true mean and std"
        return "target: raw pixels"

    def fill_buffers(self, encoder: Encoder) -> None:
        """The decoder's fixed positions."""
        self.decoder.positions = sincos_positions(encoder.grid, self.config.decoder_width)

    def take_tables(self, other: Objective, encoder: Encoder) -> None:
        """The decoder's positions, which a file may have brought, resampled, the epsilon of its
        norms, and what is known of the target."""
        assert isinstance(other, MAEObjective)
        self.target_known_from = other.target_known_from
        set_norm_eps(self.decoder, other.decoder.norm.eps)
        table = other.decoder.positions[None]
        self.decoder.positions = resampled(table, other.grid, self.grid, "timm")[0]


class MAE(Method):
    """Encodes the visible patches only and predicts the pixels of the masked ones."""

    Config: ClassVar[type] = MAEConfig
    title, explained = TITLE, EXPLAINED
    reconstructs: ClassVar[bool] = True
    defaults: ClassVar[Defaults] = DEFAULTS

    def __init__(self, config: MAEConfig, encoder_config: EncoderConfig, channels: int) -> None:
        super().__init__(config, encoder_config, channels)
        objective = MAEObjective(config, self.encoder)
        self.add("mae", objective)
        xavier_init(self.encoder, objective.decoder)
        torch.nn.init.normal_(objective.decoder.mask_token, std=0.02)

    @staticmethod
    def views(config: MAEConfig, encoder: Encoder) -> ViewSpec:
        """One random resized crop, bicubic, perhaps flipped and turned."""
        return one_crop(encoder.image_size, config)

    @classmethod
    def from_file(cls, file: Path, encoder: Encoder) -> Method | None:
        """MAE from an official pretraining file with ``decoder_`` tensors, or a Hugging Face
        ``ViTMAEForPreTraining`` folder.

        Raises:
            UserError: the decoder's tensors do not fit each other or the encoder.
        """
        decoder = read_decoder(file)
        if decoder is None:
            return None
        config = MAEConfig(
            mask_ratio=decoder.mask_ratio or 0.75,
            normalize_target=decoder.normalized is not False,
            decoder_width=decoder.width,
            decoder_depth=decoder.depth,
            decoder_heads=decoder.heads,
        )
        made = cls.blank(config, encoder.config, encoder.channels)
        load_strictly(made.encoder.vit, encoder.vit.state_dict(), str(file))
        own = made.objective.decoder
        loaded = load_strictly(own, decoder.state, f"{file}, decoder")
        log.info("%s: decoder of %s, %s", file, decoder.format, loaded)
        check(
            decoder.positions.shape == own.positions.shape,
            f"{file}: decoder_pos_embed has {len(decoder.positions)} patches; there are "
            f"{len(own.positions)}",
        )
        own.positions = decoder.positions
        set_norm_eps(own, decoder.norm_eps)
        made.objective.target_known_from = (
            decoder.known_from if decoder.normalized is not None else ""
        )
        return made


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share > 0 else "nothing"
