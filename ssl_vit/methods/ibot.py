"""iBOT (Zhou et al. 2021, arXiv 2111.07832): self-distillation of images and of masked patches."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float, Int64
from torch import Tensor, nn

from ssl_vit.methods.dino import DINOObjective
from ssl_vit.methods.dinov2 import DINOv2, DINOv2Objective
from ssl_vit.model.encoder import Encoder
from ssl_vit.objectives.heads import last_layer
from ssl_vit.options.base import Defaults
from ssl_vit.options.ibot import DEFAULTS, TITLE, IBOTConfig


class IBOTObjective(DINOv2Objective):
    """DINOv2's with another head and centre: patches have at most a last layer of their own, and a
    temperature; their centre is that of all patches, masked or not."""

    config: IBOTConfig
    teacher_temp = DINOObjective.teacher_temp

    def patch_head(self, encoder: Encoder) -> nn.Module:
        """Layer of the patches alone: a last layer."""
        c = self.config
        return nn.ModuleDict(
            {
                "last_layer": last_layer(
                    c.bottleneck, c.patch_prototypes, c.norm_last_layer, c.plain_last_layer
                )
            }
        )

    def patch_target(
        self,
        features: Float[Tensor, "all d"],
        patches: Int64[Tensor, " u"],
        weights: Float[Tensor, " u"],
        step: int,
    ) -> Float[Tensor, "u m"]:
        """Targets of masked ones of all patches; the centre moves by all."""
        c, valid = self.config, (weights > 0).to(weights.dtype)
        temperature = self.warmed(c.patch_temp_start, c.patch_temp, step)
        outputs = self.patch_outputs(self.teacher.head, features)
        masked = outputs.index_select(0, patches)
        return self.patch_targets(masked, temperature, valid, moves_by=outputs)

    def patch_outputs(self, head: Any, features: Float[Tensor, "u d"]) -> Float[Tensor, "u m"]:
        """A head's outputs of patches."""
        if "patch" not in head:
            return super().patch_outputs(head, features)
        outputs: Tensor = head["patch"]["last_layer"](head["cls"].on_sphere(features))
        return outputs


class IBOT(DINOv2):
    """The student predicts its average's output for other crops, and for patches hidden from it."""

    Config: ClassVar[type] = IBOTConfig
    title = TITLE
    objective_class: ClassVar[type[DINOv2Objective]] = IBOTObjective
    defaults: ClassVar[Defaults] = DEFAULTS
