"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193) with the options in which DINOv3 differs (Siméoni et
al. 2025, arXiv 2508.10104): self-distillation of images and of masked patches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.common.checks import (
    flag,
)
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check, naming_option
from ssl_vit.common.figures import picture_rows, to_rgb
from ssl_vit.common.schedules import Length
from ssl_vit.common.task import Place, Views
from ssl_vit.data.augment import ViewSpec
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.order import Places
from ssl_vit.methods.base import Method
from ssl_vit.methods.dino import DINO, DINOObjective
from ssl_vit.model.attention import cls_features
from ssl_vit.model.encoder import Encoder, Features
from ssl_vit.model.init import truncated_init
from ssl_vit.objectives.base import Setting
from ssl_vit.objectives.cross_entropy import cross_entropy_of_rows, cross_entropy_of_views
from ssl_vit.objectives.gram import Anchor
from ssl_vit.objectives.heads import ProjectionHead
from ssl_vit.objectives.koleo import koleo, nearest_distances
from ssl_vit.objectives.masks import BatchMasks
from ssl_vit.objectives.targets import Targets
from ssl_vit.options.base import Defaults
from ssl_vit.options.dino import DINOConfig
from ssl_vit.options.dinov2 import DEFAULTS, EXPLAINED, TITLE, DINOv2Config
from ssl_vit.pictures.similarity import similarity_panel
from ssl_vit.weights.exchange import load_strictly, resample_positions
from ssl_vit.weights.official import open_weights

# Its objective in a method; iBOT's, too.
_NAME = "dinov2"
# Above this share of the largest entropy the teacher cannot distinguish patches.
_UNIFORM = 0.99


class DINOv2Objective(DINOObjective):
    """DINO's loss of [CLS], the loss of masked patches, and KoLeo."""

    config: DINOv2Config
    head: nn.ModuleDict

    def build(self, encoder: Encoder) -> None:
        """Heads, the mask token, and what makes targets of outputs."""
        encoder.check_apart()
        c = self.config
        heads: dict[str, nn.Module] = {"cls": self._head(encoder, c.prototypes, c.bottleneck)}
        if c.patch_prototypes:
            heads["patch"] = self.patch_head(encoder)
        if c.local_norm:
            heads["local_norm"] = nn.LayerNorm(encoder.width, encoder.vit.norm.eps)
        self.head = nn.ModuleDict(heads)
        self.mask_token = nn.Parameter(torch.zeros(1, encoder.width))
        self.cls_targets = Targets(c.prototypes, c.targets, c.center_momentum)
        outputs = c.patch_prototypes or c.prototypes
        self.patch_targets = Targets(outputs, c.targets, c.center_momentum)

    def patch_head(self, encoder: Encoder) -> nn.Module:
        """Projection head of the patches."""
        c = self.config
        return self._head(encoder, c.patch_prototypes, c.patch_bottleneck or c.bottleneck)

    def _head(self, encoder: Encoder, prototypes: int, bottleneck: int) -> nn.Module:
        c = self.config
        widths = [encoder.width, *[c.head_width] * (c.head_depth - 1), bottleneck]
        return ProjectionHead(widths, prototypes, c.norm_last_layer, plain=c.plain_last_layer)

    def add_teacher(self, encoder: Encoder) -> None:
        """Copy the student for the teacher, and for that of Gram anchoring."""
        super().add_teacher(encoder)
        if self.config.gram_weight:
            self.gram = Anchor(encoder)
            self.gram.given = bool(self.config.gram_encoder)
            if self.gram.given and not self.mask_token.is_meta:
                self._open_gram_teacher()

    def _open_gram_teacher(self) -> None:
        """Give the teacher of Gram anchoring the weights of a file."""
        name, own = self.config.gram_encoder, self.gram.encoder
        option = flag(self.config, "gram_encoder")
        with naming_option(option, name):
            given = open_weights(name, option=option).encoder
        state = resample_positions(given.vit.state_dict(), given, own)
        load_strictly(own.vit, state, f"{option} {name}")

    def encoder_replaced(self, encoder: Encoder) -> None:
        """Student and teachers start equal; but a given one of Gram anchoring stays."""
        super().encoder_replaced(encoder)
        if self.config.gram_weight and not self.gram.given:
            self.gram.start_from(encoder)

    def set_length(self, steps: int, steps_per_epoch: int) -> None:
        """Resolve what depends on the length of the training."""
        super().set_length(steps, steps_per_epoch)
        c = self.config
        self.warm_steps = self.temp_warmup.steps(steps_per_epoch)
        if c.gram_weight and hasattr(self, "gram"):
            start = Length.parse(c.gram_from, flag(c, "gram_from"))
            every = Length.parse(c.gram_every or "0st", flag(c, "gram_every"))
            self.gram.start = start.steps(steps_per_epoch)
            self.gram.interval = every.steps(steps_per_epoch)

    def teacher_temp(self, step: int) -> float:
        """Temperature at a step, counted from 0: linear, then constant."""
        c = self.config
        if step >= self.warm_steps:
            return c.teacher_temp
        share = step / max(1, self.warm_steps - 1)
        return c.teacher_temp_start + (c.teacher_temp - c.teacher_temp_start) * share

    def forward(self, encoder: Encoder, views: Views, step: int) -> dict[str, Tensor]:
        """The losses of a batch and, of the same outputs, what shows a collapse."""
        c, self.images = self.config, len(views.keys)
        both, large = self._global_crops(views)
        patches, weights = views.drawn["patches"], self._weights(encoder.patch_size, views)
        target, patch_target = self._teachers(both, patches, weights, step)
        # The student sees mask tokens in global crops, and local crops whole.
        tokens = encoder.embed(both, masked=views.drawn["masked"], token=self.mask_token[0])
        seen = encoder.split(encoder.encode(tokens), tokens.grid)
        assert seen.cls is not None
        norm = self.head["local_norm"] if c.local_norm else None
        local = [cls_features(encoder, crops, norm) for crops in views.crops[2:]]
        student = self.head["cls"](torch.cat([seen.cls, *local]))
        cls_loss = cross_entropy_of_views(
            target.unflatten(0, (2, -1)),
            student.unflatten(0, (-1, self.images)),
            c.student_temp,
            c.local_weight,
        )
        masked = seen.patches.flatten(0, 1).index_select(0, patches)  # no other is looked at
        patch_student = self.patch_outputs(self.head, masked)
        share = weights / len(both)
        patch_loss = cross_entropy_of_rows(patch_target, patch_student, share, c.student_temp)
        spread, distance = self._spread(seen.cls)
        loss = cls_loss + c.patch_weight * patch_loss + c.koleo_weight * spread
        found = {"cls_loss": cls_loss, "patch_loss": patch_loss, "koleo": spread}
        if c.gram_weight:
            found["gram_loss"] = self.gram.loss(seen, large, step)
            loss = loss + c.gram_weight * found["gram_loss"]
        found = {name: value.detach() for name, value in found.items()}
        found |= self._health_of_both(target, patch_target, weights, found)
        return {"loss": loss, **found, "neighbour_distance": distance}

    def _global_crops(
        self, views: Views
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c height width"]]:
        """Global crops, and as large as the teacher of Gram anchoring sees them: those are what
        workers make, if there is one."""
        large = torch.cat(views.crops[:2])
        scale = self.config.gram_scale if self.config.gram_weight else 1
        if scale == 1:
            return large, large
        size = [side // scale for side in large.shape[2:]]
        return F.interpolate(large, size=size, mode="bicubic", antialias=True), large

    @torch.no_grad()
    def _weights(self, patch: int, views: Views) -> Float[Tensor, " u"]:
        """Weights of masked patches; 0 for padding, and where a patch has no data."""
        weights = views.drawn["weights"].to(self.mask_token.dtype)
        if not views.missing:
            return weights
        missing = torch.cat(views.missing[:2]).all(1)
        side = patch * (self.config.gram_scale if self.config.gram_weight else 1)
        apart = missing.unflatten(1, (-1, side)).unflatten(3, (-1, side))
        empty = apart.all(4).all(2).flatten()
        return weights * ~empty[views.drawn["patches"]]

    @torch.no_grad()
    def _teachers(
        self,
        both: Float[Tensor, "n c h w"],
        patches: Int64[Tensor, " u"],
        weights: Float[Tensor, " u"],
        step: int,
    ) -> tuple[Float[Tensor, "n k"], Float[Tensor, "u m"]]:
        """Targets for the [CLS] of all global crops, and for masked patches; crops are whole."""
        head: Any = self.teacher.head
        seen = self.teacher.encoder(both)
        features = seen.patches.flatten(0, 1)
        return (
            self.cls_targets(head["cls"](seen.cls), self.teacher_temp(step)),
            self.patch_target(features, patches, weights, step),
        )

    def patch_target(
        self,
        features: Float[Tensor, "all d"],
        patches: Int64[Tensor, " u"],
        weights: Float[Tensor, " u"],
        step: int,
    ) -> Float[Tensor, "u m"]:
        """Targets of masked ones of all patches, of which the teacher's features are given; where
        their weight is 0 they do not count."""
        outputs = self.patch_outputs(self.teacher.head, features.index_select(0, patches))
        valid = (weights > 0).to(weights.dtype)
        return self.patch_targets(outputs, self.teacher_temp(step), valid)

    def patch_outputs(self, head: Any, features: Float[Tensor, "u d"]) -> Float[Tensor, "u m"]:
        """A head's outputs of patches."""
        outputs: Tensor = head["patch" if "patch" in head else "cls"](features)
        return outputs

    def _spread(self, cls: Float[Tensor, "n d"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """KoLeo, summed over the global crops, each of which is a batch; mean distance."""
        with torch.set_grad_enabled(self.config.koleo_weight > 0):
            distances = [nearest_distances(x, self.config.koleo_images) for x in cls.chunk(2)]
            spread = torch.stack([koleo(d) for d in distances]).sum()
        return spread, torch.stack(distances).mean().detach()

    def _health_of_both(
        self,
        target: Float[Tensor, "n k"],
        patch_target: Float[Tensor, "u m"],
        weights: Float[Tensor, " u"],
        losses: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Health of both kinds of targets; a loss less its targets' entropy is a KL."""
        c = self.config
        cls = self.cls_targets.health(target)
        patch = self.patch_targets.health(patch_target, weights)
        pairs = (1 + c.local_crops * c.local_weight) / (1 + c.local_crops)
        masked = weights.sum() / len(target)
        own = losses["patch_loss"] / masked.clamp(min=1 / len(target))
        cls["kl"] = losses["cls_loss"] - pairs * cls["teacher_entropy"]
        patch["kl"] = own - patch["teacher_entropy"]
        return cls | {f"patch_{name}": value for name, value in patch.items()}

    def concerns(self, means: dict[str, float]) -> dict[str, str]:
        """DINO's, and of patches."""
        found, share = super().concerns(means), means["patch_teacher_entropy_share"]
        if share > _UNIFORM:
            found["uniform patches"] = (
                f"the teacher's output is the same for every patch: it is uniform ({share:.1%} of "
                "the largest entropy), so there is nothing to learn of patches. Usual remedies: a "
                f"lower {flag(self.config, 'teacher_temp')}, a lower --optim.lr"
            )
        return found

    def advice(self, setting: Setting) -> list[str]:
        """DINO's, and what is of a part of a step only."""
        c, lines = self.config, super().advice(setting)
        each = setting.batch_size // setting.parts
        apart = c.koleo_weight and not 0 < c.koleo_images <= each
        parts = [f"{flag(c, 'koleo_weight')} {c.koleo_weight:g}"] if apart else []
        parts += [f"{flag(c, 'targets')} sinkhorn"] if c.targets == "sinkhorn" else []
        if setting.parts > 1 and parts:
            lines.append(
                f"{' and '.join(parts)}: among the {each} images of each of the {setting.parts} "
                "parts of --optim.accumulate, not among the whole batch"
            )
        return lines

    def after_update(self, encoder: Encoder, step: int, took: Bool[Tensor, ""]) -> None:
        """Move teacher and centres."""
        self.teacher.follow(encoder, self.head, self.teacher_momentum(step), took)
        self.cls_targets.update(took)
        self.patch_targets.update(took)
        if self.config.gram_weight:
            self.gram.renew(self.teacher.encoder, step + 1)


def masks(config: DINOv2Config, grid: tuple[int, int]) -> BatchMasks:
    """Masks of the global crops, of these rows and columns of patches."""
    return BatchMasks(grid, 2, config.mask_probability, config.mask_ratio, config.exact_masks)


def _enlarged(spec: ViewSpec, scale: int) -> ViewSpec:
    """The same with global crops of so many times the size."""
    sizes = [(scale * crop.size[0], scale * crop.size[1]) for crop in spec.crops[:2]]
    large = (replace(c, size=size) for c, size in zip(spec.crops[:2], sizes, strict=True))
    return replace(spec, crops=(*large, *spec.crops[2:]))


class DINOv2(DINO):
    """The student predicts its average's output for other crops, and for patches hidden from it."""

    Config: ClassVar[type] = DINOv2Config
    title, explained = TITLE, EXPLAINED
    objective_class: ClassVar[type[DINOv2Objective]] = DINOv2Objective
    progress: ClassVar[tuple[str, ...]] = ("kl", "patch_kl", "teacher_entropy_share")
    splits_with: ClassVar[dict[str, Any]] = {"targets": "centering", "koleo_weight": 0.0}
    defaults: ClassVar[Defaults] = DEFAULTS

    def __init__(self, config: DINOv2Config, encoder_config: EncoderConfig, channels: int) -> None:
        Method.__init__(self, config, encoder_config, channels)
        size = self.encoder.image_size
        shown, own = ("x".join(map(str, s)) for s in (config.global_size, size))
        check(
            config.sizes(size, self.encoder.patch_size)[0] == size,
            f"{flag(config, 'global_size')} is {shown}; masks are of the encoder's patches, of "
            f"{own} px: give --encoder.image-size instead",
        )
        objective = self.objective_class(config, self.encoder)
        truncated_init(self.encoder, objective.head)
        objective.add_teacher(self.encoder)
        self.add(_NAME, objective)

    @staticmethod
    def views(config: DINOConfig, encoder: Encoder) -> ViewSpec:
        """DINO's; with Gram anchoring global crops are made as large as its teacher sees them."""
        spec = DINO.views(config, encoder)
        assert isinstance(config, DINOv2Config)
        if not config.gram_weight:
            return spec
        scale = config.gram_scale
        phases = tuple(replace(p, spec=_enlarged(p.spec, scale)) for p in spec.phases)
        return replace(_enlarged(spec, scale), phases=phases)

    @staticmethod
    def draw_together(
        config: DINOv2Config, grid: tuple[int, int], places: Places
    ) -> dict[str, np.ndarray]:
        """Masks of the global crops: see :meth:`BatchMasks.draw`."""
        return masks(config, grid).draw(places)

    def network_of(self, name: str) -> str:
        """The encoder, or a head."""
        start = f"objectives.{_NAME}.head."
        return name.removeprefix(start).split(".")[0] if name.startswith(start) else "encoder"

    def place_of(self, name: str) -> Place:
        """Place of a parameter, as of any method; the mask token stands before the first block."""
        if name.endswith("mask_token"):
            return Place(above=len(self.encoder.vit.blocks) + 1)
        return super().place_of(name)

    def panels(self, views: Views, normalize: Normalize) -> dict[str, np.ndarray]:
        """Attention of the teacher's [CLS], similarities of its patches, and masks as the student
        gets them."""
        looks, images = super().panels(views, normalize), views.crops[0]
        shown, seen = to_rgb(normalize.inverse(images)), self._seen_by_teacher(images)
        looks["similarity"] = similarity_panel(shown, seen.patches.float(), seen.grid)
        return looks | {"masks": self._masks_panel(views, normalize)}

    @torch.no_grad()
    def _seen_by_teacher(self, images: Float[Tensor, "b c h w"]) -> Features:
        return self.exported_encoder()(images)

    @torch.no_grad()
    def _masks_panel(self, views: Views, normalize: Normalize) -> np.ndarray:
        encoder, images = self.encoder, views.crops[0]
        masked = self.drawn(views.keys)["masked"].view(2, len(images), -1)
        shown = normalize.inverse(images)
        columns = {"image": to_rgb(shown)}
        for title, hidden in zip(("first crop", "second crop"), masked, strict=True):
            patches = torch.where(hidden[:, :, None], 0.5, encoder.patchify(shown))
            columns[title] = to_rgb(encoder.unpatchify(patches, encoder.grid))
        caption = (
            "Masks such as the student gets for its two crops of an image: half of all crops have "
            "one, of very different sizes. The teacher sees crops whole."
        )
        return picture_rows(columns, caption)
