"""What others do with the same images and sizes, built anew to be measured beside ours.

The reference chain follows its description (Caron et al. 2021, section 3.2 and appendix; He et al.
2022, appendix A.1), in the libraries its authors used: PIL and torchvision. The peer's training
step is made of the parts that lightly publishes for it.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms

from ssl_vit.config import EncoderConfig, OptimConfig, UserError, check
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.photometric import Photometric
from ssl_vit.encoder import timm_kwargs
from ssl_vit.training.parallel import autocast

_MODES = {1: "L", 3: "RGB"}


class OriginalChain:
    """Every crop of an image finished in the worker: PIL images through torchvision transforms.

    Args:
        spec: the crops, with their probabilities and strengths.
        channels: 3, or 1.
        mean: of each channel, images scaled to 0..1.
        std: likewise.

    Raises:
        UserError: another number of channels.
    """

    def __init__(
        self, spec: ViewSpec, channels: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        check(
            channels in _MODES,
            f"--against original reads images by PIL, with 3 channels or 1; "
            f"--data.channels is {channels}",
        )
        self.mode = _MODES[channels]
        last = [transforms.ToTensor(), transforms.Normalize(mean, std)]
        self.crops: list[Callable[[Image.Image], Tensor]] = []
        for crop in spec.crops:
            self.crops += [transforms.Compose([*_operations(crop), *last])] * crop.count

    def open(self, raw: bytes | np.ndarray) -> Image.Image:
        """The decoded image; an 8-bit array stands for itself.

        Raises:
            OSError: not an image, or a damaged one.
        """
        if isinstance(raw, np.ndarray):
            return Image.fromarray(raw).convert(self.mode)
        return Image.open(io.BytesIO(raw)).convert(self.mode)

    def __call__(self, raw: bytes | np.ndarray) -> list[Tensor]:
        """The crops (C, h, w) of one image, float, normalised, in the order of the spec."""
        image = self.open(raw)
        return [crop(image) for crop in self.crops]

    def batch(self, raws: Sequence[bytes | np.ndarray]) -> list[Tensor]:
        """The batch a worker hands over: for each crop (B, C, h, w)."""
        return [torch.stack(same) for same in zip(*map(self, raws), strict=True)]


def _operations(crop: Crop) -> list[Callable[[Image.Image], Image.Image]]:
    """What is done to one crop, on PIL images."""
    bicubic = transforms.InterpolationMode.BICUBIC
    return [
        transforms.RandomResizedCrop(crop.size, crop.scale, crop.ratio, interpolation=bicubic),
        transforms.RandomHorizontalFlip(crop.flip),
        *(_colours(crop.photometric) if crop.photometric else []),
    ]


def _colours(p: Photometric) -> list[Callable[[Image.Image], Image.Image]]:
    jitter = transforms.ColorJitter(p.brightness, p.contrast, p.saturation, p.hue)
    return [
        transforms.RandomApply([jitter], p=p.jitter),
        transforms.RandomGrayscale(p.gray),
        _Sometimes(p.blur, lambda x: x.filter(ImageFilter.GaussianBlur(_radius(p)))),
        _Sometimes(p.solarize, ImageOps.solarize),
    ]


def _radius(p: Photometric) -> float:
    return random.uniform(*p.blur_sigma)


@dataclass(frozen=True)
class _Sometimes:
    """``change`` with this probability."""

    probability: float
    change: Callable[[Image.Image], Image.Image]

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.change(image) if random.random() < self.probability else image


class LightlyDINO:
    """One training step of DINO made of lightly's modules, around its wrapper of a timm ViT.

    ``method`` is the ``DINOConfig`` whose sizes both sides have: prototypes, head, bottleneck, gain
    of the last layer. The teacher sees the two global crops, the student all. ``grouped``: crops of
    one size go through the networks together, as in lightly's own ImageNet benchmark; else one crop
    after another, as in its example. Gradients are clipped by their global norm where ours are
    clipped at all; AdamW is torch's default.

    Raises:
        UserError: lightly is not installed, or it cannot be built in these sizes.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        channels: int,
        method: Any,
        optim: OptimConfig,
        device: torch.device,
        precision: torch.dtype,
        grouped: bool,
    ) -> None:
        self.modules, loss, self.utils = _lightly()
        check(
            method.head_depth == 3,
            f"--method.head-depth is {method.head_depth}; lightly's head has 3 layers",
        )
        self.method, self.optim, self.device, self.precision = method, optim, device, precision
        self.grouped = grouped
        self.student = self._network(encoder, channels, encoder.drop_path)
        self.teacher = self._network(encoder, channels, 0.0)
        self.teacher.load_state_dict(self.student.state_dict(), strict=True)
        self.utils.deactivate_requires_grad(self.teacher)
        self.loss = loss.DINOLoss(
            output_dim=method.prototypes,
            student_temp=method.student_temp,
            center_momentum=method.center_momentum,
        ).to(device)
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=optim.peak_lr, betas=optim.betas)

    def _network(self, encoder: EncoderConfig, channels: int, drop_path: float) -> Any:
        """[CLS] of the ViT, then the head."""
        vit: Any = timm.create_model(
            encoder.arch,
            num_classes=0,
            drop_path_rate=drop_path,
            dynamic_img_size=True,
            **timm_kwargs(encoder, channels),
        )
        rows, columns = vit.patch_embed.grid_size
        check(rows == columns, "--against lightly needs square images; it takes their shape so")
        width = vit.embed_dim
        # Its default for positions fixes them; DINO learns them.
        learned = encoder.positions == "learned"
        backbone = self.modules.MaskedVisionTransformerTIMM(
            vit, pos_embed_initialization="skip" if learned else "sincos"
        )
        backbone.mask_token.requires_grad_(False)  # nothing is masked
        head = self.modules.DINOProjectionHead(
            input_dim=width,
            hidden_dim=self.method.head_width,
            bottleneck_dim=self.method.bottleneck,
            output_dim=self.method.prototypes,
            norm_last_layer=self.method.norm_last_layer,
        )
        return torch.nn.Sequential(backbone, head).to(self.device)

    @property
    def parameters(self) -> int:
        """Weights of student and teacher."""
        networks = (self.student, self.teacher)
        return sum(p.numel() for network in networks for p in network.parameters())

    def losses(self, views: list[Tensor]) -> Tensor:
        """The loss of views (B, C, h, w), normalised, the two global ones first."""
        if self.grouped:
            kinds = [torch.cat(views[:2]), *([torch.cat(views[2:])] if views[2:] else [])]
            with torch.no_grad():
                said = list(self.teacher(kinds[0]).chunk(2))
            answers = list(torch.cat([self.student(k) for k in kinds]).chunk(len(views)))
        else:
            with torch.no_grad():
                said = [self.teacher(view) for view in views[:2]]
            answers = [self.student(view) for view in views]
        loss: Tensor = self.loss(said, answers, teacher_temp=self.method.teacher_temp)
        return loss

    def step(self, views: list[Tensor]) -> Tensor:
        """One optimizer step; the loss, which stays on the device."""
        self.student.train()
        self.teacher.train()
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            loss = self.losses(views)
        loss.backward()
        if self.optim.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.trained, self.optim.clip)
        self.optimizer.step()
        self.utils.update_momentum(self.student, self.teacher, m=self.method.momentum)
        return loss.detach()


def _lightly() -> tuple[Any, Any, Any]:
    """lightly's modules, losses and utilities."""
    try:
        names = ("lightly.models.modules", "lightly.loss", "lightly.models.utils")
        modules, loss, utils = (import_module(name) for name in names)
    except ImportError as error:
        raise UserError(
            f"--against lightly needs lightly ({error}); install it: pip install 'ssl_vit[bench]'"
        ) from None
    return modules, loss, utils
