"""Encoder: the shared Vision Transformer, patchify -> embed -> encode -> pool, on a timm model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check
from ssl_vit.model.architecture import (
    check_sizes,
    set_norm_eps,
    stem_option,
    timm_kwargs,
    without_memory,
)
from ssl_vit.model.block import lean_blocks
from ssl_vit.model.drop_path import draw_for_whole_batch
from ssl_vit.model.positions import resampled, sincos_positions
from ssl_vit.model.rope import Augmentation, Rope, Rotation


@dataclass
class Features:
    """An encoder's output: [CLS] (B, D) or None, patches (B, N, D), grid (rows, columns).

    ``norm`` is applied to each pooled vector, where the final norm sits after the pooling; else it
    has been applied to the tokens, and is None.
    """

    cls: Tensor | None
    patches: Tensor
    grid: tuple[int, int]
    norm: nn.Module | None = None

    def pool(self, kind: str) -> Float[Tensor, "b _"]:
        """One vector an image: ``cls``, ``mean`` (of patches) or ``cls+mean`` (both, joined)."""
        norm = self.norm or nn.Identity()
        mean = norm(self.patches.mean(1))
        if kind == "mean":
            return mean
        check(self.cls is not None, f"pooling is {kind!r}; this encoder has no [CLS]: use mean")
        check(kind in ("cls", "cls+mean"), f"pooling is {kind!r}; allowed: cls, mean, cls+mean")
        cls = norm(self.cls)
        return cls if kind == "cls" else torch.cat([cls, mean], dim=1)


@dataclass
class Tokens:
    """Patch tokens between ``Encoder.embed`` and ``Encoder.encode``, which keep their places.

    Attributes:
        values: (B, K, D), positions that are added to tokens included.
        grid: rows and columns of patches in the images they come from.
        places: (B, K) each token's patch in that grid, row by row; None: all patches in order.
            What turns queries and keys (RoPE) by a token's own position finds it here.
    """

    values: Tensor
    grid: tuple[int, int]
    places: Tensor | None = None


class Encoder(nn.Module):
    """A Vision Transformer (Dosovitskiy et al. 2021) that can embed only some of its patches.

    ``vit`` is a timm ``VisionTransformer`` or, with rotary positions (DINOv3), its ``Eva``, so
    ``encoder.vit.state_dict()`` has timm's keys.

    Args:
        config: architecture and changes to it.
        channels: channels of the images.

    Raises:
        UserError: an unknown or unsuitable architecture, or sizes that do not fit together.
    """

    vit: Any  # timm leaves its submodules untyped

    def __init__(self, config: EncoderConfig, channels: int = 3) -> None:
        super().__init__()
        kwargs = timm_kwargs(config, channels)
        check_sizes(config, kwargs)
        self.config = config
        self.channels = channels
        kwargs |= stem_option(config.stem)
        self.vit = timm.create_model(
            config.arch, num_classes=0, drop_path_rate=config.drop_path, **kwargs
        )
        draw_for_whole_batch(self.vit)
        lean_blocks(self.vit)
        if config.norm_eps:
            set_norm_eps(self.vit, config.norm_eps)
        patches = self.vit.patch_embed
        self.image_size: tuple[int, int] = tuple(patches.img_size)
        self.patch_size: int = patches.feat_ratio()
        self.grid: tuple[int, int] = tuple(patches.grid_size)
        self.width: int = self.vit.embed_dim
        if self.vit.attn_pool is not None:
            self.vit.attn_pool.requires_grad_(False)  # kept for its names; features do not use it
        self.augmented = True
        """True if training changes the coordinates of patches (RoPE), as ``config`` says."""
        if self.rotary:
            self.rope = Rope(
                self.width // self.vit.blocks[0].attn.num_heads,
                self.vit.num_prefix_tokens,
                config.rope_periods,
                config.rope_coords,
                Augmentation(config.rope_shift, config.rope_jitter, config.rope_rescale),
            )
        if config.positions == "sincos" and not self.rotary:
            self._fix_positions()

    @property
    def rotary(self) -> bool:
        """True if positions turn queries and keys, instead of being added to tokens."""
        return self.vit.pos_embed is None

    def _fix_positions(self) -> None:
        """Sine-cosine values in timm's own parameter, which then is not trained."""
        position = self.vit.pos_embed
        prefix = position.shape[1] - self.grid[0] * self.grid[1]
        with torch.no_grad():
            position.zero_()
            position[0, prefix:] = sincos_positions(self.grid, self.width)
        position.requires_grad_(False)

    def patchify(self, images: Shaped[Tensor, "b c h w"]) -> Shaped[Tensor, "b n ppc"]:
        """Images as flattened patches; pixels of a patch are ordered (row, column, channel)."""
        self._check_size(images)
        p = self.patch_size
        return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)

    def _check_size(self, images: Shaped[Tensor, "b c h w"]) -> None:
        p, (height, width) = self.patch_size, images.shape[-2:]
        check(
            height % p == 0 and width % p == 0,
            f"an image of {height}x{width} pixels does not divide into patches of {p}",
        )

    def unpatchify(
        self, patches: Float[Tensor, "b n ppc"], grid: tuple[int, int]
    ) -> Float[Tensor, "b c h w"]:
        """The inverse of :meth:`patchify`, for images of ``grid`` (rows, columns) patches."""
        h, w = grid
        p = self.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)

    def grid_of(self, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """Rows and columns of patches in these images."""
        return images.shape[2] // self.patch_size, images.shape[3] // self.patch_size

    def positions(
        self, grid: tuple[int, int]
    ) -> tuple[Tensor | None, Float[Tensor, "1 n d"] | None]:
        """Positions of (prefix tokens, patches), resampled for another grid; None where they have
        none.

        As ``config.resampling`` says; ``mixed``: for a smaller grid, that of DINO's local crops, as
        the original DINO does, for a larger one as timm does.
        """
        if self.rotary:
            return None, None
        position = self.vit.pos_embed
        prefix = position.shape[1] - self.grid[0] * self.grid[1]
        kind: str = self.config.resampling
        if kind == "mixed":
            smaller = grid[0] < self.grid[0] or grid[1] < self.grid[1]
            kind = "dino" if smaller else "timm"
        patches = resampled(position[:, prefix:], self.grid, grid, kind)
        return (position[:, :prefix] if prefix else None), patches

    def embed(
        self,
        images: Float[Tensor, "b c h w"],
        keep: Int[Tensor, "b k"] | None = None,
        masked: Bool[Tensor, "b n"] | None = None,
        token: Float[Tensor, " d"] | None = None,
    ) -> Tokens:
        """Patch tokens with their positions: of all N patches, or of K.

        Args:
            keep: of each image the patches to embed; others are never projected.
            masked: the patches (of all N) whose projection is replaced by ``token``, before
                positions are added.
            token: what stands for a masked patch; needed with ``masked``.
        """
        grid = self.grid_of(images)
        position = self.positions(grid)[1]
        if keep is not None:
            position = None if position is None else position[0][keep]
        tokens = self._project(images, keep, hidden=masked is not None)
        if masked is not None:
            assert token is not None, "masked patches need a token that stands for them"
            masked = masked if keep is None else masked.gather(1, keep)
            tokens = torch.where(masked[:, :, None], token.to(tokens.dtype), tokens)
        # The sum of all blocks is kept in the weights' precision, whatever a block computes in.
        kind = self.vit.patch_embed.proj.weight.dtype
        placed = tokens.to(kind) if position is None else tokens + position
        return Tokens(placed, grid, keep)

    def _project(
        self, images: Float[Tensor, "b c h w"], keep: Int[Tensor, "b k"] | None, hidden: bool
    ) -> Float[Tensor, "b _ d"]:
        """Tokens without positions: of all patches, or of those to ``keep``."""
        stem = self.vit.patch_embed
        if self.config.stem == "conv":
            if keep is not None or hidden:
                self.check_apart()
            self._check_size(images)
            return stem(images)
        patches = self.patchify(images)
        if keep is not None:
            patches = take(patches, keep)
        # The stride-P convolution of timm is this linear map, with its weights reordered.
        weight = rearrange(stem.proj.weight, "d c p q -> d (p q c)")
        return stem.norm(F.linear(patches, weight, stem.proj.bias))

    def check_apart(self) -> None:
        """Check that a patch token is of that patch alone, for methods that hide patches.

        Raises:
            UserError: the stem lets patches see their neighbours.
        """
        check(
            self.config.stem == "patch",
            f"--encoder.stem is {self.config.stem}, whose patches see their neighbours; methods "
            "that hide patches need --encoder.stem patch",
        )

    def encode(self, tokens: Tokens) -> Float[Tensor, "b m d"]:
        """Prefix tokens ([CLS] first) and patch tokens through all blocks and the final norm."""
        x = self.with_prefix(tokens)
        for block, turn in self.blocks(tokens):
            x = block(x, **turn)
        return self.vit.norm(x)

    def blocks(self, tokens: Tokens) -> Iterator[tuple[nn.Module, dict[str, Rotation]]]:
        """All blocks in order, each with the rotation of these tokens' positions, if any."""
        if not self.rotary:
            yield from ((block, {}) for block in self.vit.blocks)
            return
        blocks, like = self.vit.blocks, self.vit.patch_embed.proj.weight
        changed = self.training and self.augmented
        turns = self.rope.turns(tokens.grid, tokens.places, like, len(blocks), changed)
        for block, turn in zip(blocks, turns, strict=True):
            yield block, {"rotation": turn}

    def with_prefix(self, embedded: Tokens) -> Float[Tensor, "b m d"]:
        """Input of the first block: [CLS] and registers, if any, before the patch tokens."""
        vit, tokens = self.vit, embedded.values
        prefix = [t for t in (vit.cls_token, vit.reg_token) if t is not None]
        if prefix:
            joined = torch.cat(prefix, dim=1)
            position = self.positions(self.grid)[0]
            joined = joined if position is None else joined + position
            joined = joined.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
            tokens = torch.cat([joined, tokens], dim=1)
        return vit.norm_pre(vit.pos_drop(tokens))

    def split(self, tokens: Float[Tensor, "b m d"], grid: tuple[int, int]) -> Features:
        """The encoder's output as [CLS] and patches; registers are left out."""
        cls = tokens[:, 0] if self.vit.cls_token is not None else None
        norm = self.vit.fc_norm if self.config.norm == "pooled" else None
        return Features(cls, tokens[:, self.vit.num_prefix_tokens :], grid, norm)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Features:
        """Features of whole images of any size that the patch size divides."""
        return self.intermediate(images, last=1)[0]

    def intermediate(self, images: Float[Tensor, "b c h w"], last: int) -> list[Features]:
        """Features after each of the ``last`` blocks, in order, all through the final norm."""
        depth = len(self.vit.blocks)
        check(1 <= last <= depth, f"{last} last blocks asked; the encoder has {depth}")
        tokens = self.embed(images)
        x = self.with_prefix(tokens)
        outputs = []
        for i, (block, turn) in enumerate(self.blocks(tokens)):
            x = block(x, **turn)
            if i >= depth - last:
                outputs.append(self.split(self.vit.norm(x), tokens.grid))
        return outputs


def take(tokens: Shaped[Tensor, "b n d"], index: Int[Tensor, "b k"]) -> Shaped[Tensor, "b k d"]:
    """Tokens of each image at its own indices."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def image_size(config: EncoderConfig) -> tuple[int, int]:
    """Height and width in pixels of the images an architecture is made for."""
    with without_memory():
        return Encoder(dataclasses.replace(config, positions="learned")).image_size


def parameter_count(module: nn.Module) -> int:
    """Number of weights of a module, trained or not."""
    return sum(p.numel() for p in module.parameters())
