"""Peers of DINO from lightly: its step, and its chain of augmentations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ssl_vit.benchmarks.chains import OriginalChain
from ssl_vit.benchmarks.peers import check_plain, library
from ssl_vit.benchmarks.side import Workload
from ssl_vit.benchmarks.teacher_student import TeacherAndStudent
from ssl_vit.common.errors import check
from ssl_vit.data.augment import ViewSpec
from ssl_vit.data.photometric import Photometric

_PARTS = ("models.modules", "models.utils", "loss")


class LightlyDINO(TeacherAndStudent):
    """lightly DINO step: its modules around a timm ViT, one view after another, as in its example.

    Gradients are clipped by their global norm if ours are clipped at all.
    """

    grouped = False

    @staticmethod
    def load() -> None:
        """Import of lightly."""
        warnings.filterwarnings("ignore", category=FutureWarning)
        library("lightly", "lightly", *_PARTS)

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.modules, self.utils, loss = library("lightly", "lightly", *_PARTS)
        method = work.method
        check(
            method.head_depth == 3,
            f"--method.head-depth is {method.head_depth}; lightly's head has 3 layers",
        )
        check_plain(work, "lightly")
        self.criterion = loss.DINOLoss(
            output_dim=method.prototypes,
            student_temp=method.student_temp,
            center_momentum=method.center_momentum,
        ).to(work.device)
        self.begin_both([self._network(rate) for rate in self.drop_paths])

    def _network(self, drop_path: float) -> nn.Module:
        method, vit = self.work.method, self.vit(drop_path)
        # lightly's default position embedding is fixed; DINO's is learned.
        learned = self.work.encoder.positions == "learned"
        backbone = self.modules.MaskedVisionTransformerTIMM(
            vit, pos_embed_initialization="skip" if learned else "sincos"
        )
        backbone.mask_token.requires_grad_(False)  # nothing is masked
        head = self.modules.DINOProjectionHead(
            input_dim=vit.embed_dim,
            hidden_dim=method.head_width,
            bottleneck_dim=method.bottleneck,
            output_dim=method.prototypes,
            norm_last_layer=method.norm_last_layer,
        )
        return nn.Sequential(backbone, head)

    def vits(self) -> list[Any]:
        """ViTs of student and teacher."""
        return [self.networks.student[0].vit, self.networks.teacher[0].vit]

    def last_layer(self) -> nn.Module:
        """The head's last layer."""
        last: nn.Module = self.networks.student[1].last_layer
        return last

    def loss(self, views: list[Tensor]) -> Tensor:
        """lightly's DINO loss: the teacher sees the two global crops, the student all crops."""
        student, teacher = self.networks.student, self.networks.teacher
        if self.grouped:
            kinds = [torch.cat(views[:2]), *([torch.cat(views[2:])] if views[2:] else [])]
            with torch.no_grad():
                targets = list(teacher(kinds[0]).chunk(2))
            logits = list(torch.cat([student(k) for k in kinds]).chunk(len(views)))
        else:
            with torch.no_grad():
                targets = [teacher(view) for view in views[:2]]
            logits = [student(view) for view in views]
        loss: Tensor = self.criterion(targets, logits, teacher_temp=self.teacher_temp)
        return loss

    def clip(self) -> None:
        """Gradient clipping by the global norm."""
        if self.work.optim.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.trained, self.work.optim.clip)
        super().clip()

    def move_teacher(self) -> None:
        """EMA update by lightly's own function."""
        net = self.networks
        self.utils.update_momentum(net.student, net.teacher, m=self.momentum)


class LightlyGroupedDINO(LightlyDINO):
    """lightly DINO step with crops of one size together, as in lightly's ImageNet benchmark."""

    grouped = True


class LightlyChain(OriginalChain):
    """lightly chain: its DINO transform, with our crop sizes and probabilities.

    Raises:
        UserError: crops that it cannot make, another number of channels, or lightly is missing.
    """

    name = "lightly"

    def _views(
        self, spec: ViewSpec, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> Callable[[Image.Image], list[Tensor]]:
        first, second, *others = spec.crops
        local = others[0] if others else first
        every = [c.photometric for c in (first, second, local)]
        assert all(every), "DINO's crops have photometric operations"
        p, solarized, small = (c or Photometric() for c in every)
        square = all(c.size[0] == c.size[1] for c in spec.crops)
        check(square, "--against lightly needs square crops; its transform makes no others")
        transform = library("lightly", "lightly", "transforms")[0].DINOTransform(
            global_crop_size=first.size[0],
            global_crop_scale=first.scale,
            local_crop_size=local.size[0],
            local_crop_scale=local.scale,
            n_local_views=others[0].count if others else 0,
            hf_prob=first.flip,
            vf_prob=first.vertical_flip,
            cj_prob=p.jitter,
            cj_strength=1.0,
            cj_bright=p.brightness,
            cj_contrast=p.contrast,
            cj_sat=p.saturation,
            cj_hue=p.hue,
            random_gray_scale=p.gray,
            gaussian_blur=(p.blur, solarized.blur, small.blur),
            sigmas=p.blur_sigma,
            solarization_prob=solarized.solarize,
            normalize={"mean": list(mean), "std": list(std)},
        )
        made: Callable[[Image.Image], list[Tensor]] = transform
        return made
