"""Feature maps: an encoder of any kind as a pyramid of maps, for heads on places in an image."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_vit.common.errors import UserError, check
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.model.encoder import Encoder


class FeatureMaps(nn.Module):
    """Feature maps of an encoder, frozen or trained: images -> maps, the finest first.

    Of a plain ViT: patch tokens after some of its blocks, each through the final norm. Of other
    networks, as timm's ``forward_intermediates`` gives them: after the last block of each stage
    (Swin, ConvNeXt, ResNet), the last stage through the final norm if there is one; where all
    blocks have one resolution (SAM's ViT), after some of them, without what follows them.

    Args:
        network: an :class:`Encoder`, or a timm network with ``forward_intermediates``.
        count: number of maps: of the last blocks, or of the last stages.
        spread: of equal resolutions, those after blocks spread evenly over the depth, the last
            included, instead of the last ones. As DPT reads a ViT (Ranftl et al. 2021).

    Attributes:
        widths: channels of each map.
        strides: pixels between the centres of neighbouring places of each map.

    Raises:
        UserError: the network has fewer blocks or stages, or cannot give maps.
    """

    def __init__(self, network: nn.Module, count: int = 1, spread: bool = False) -> None:
        super().__init__()
        self.network = network
        if isinstance(network, Encoder):
            depth = len(network.vit.blocks)
            widths, strides = [network.width] * depth, [network.patch_size] * depth
        else:
            widths, strides = _stages(network)
        places = _last_of_each(strides)
        if len(places) == 1:  # one resolution: after each block
            places, name = list(range(len(strides))), "blocks"
        else:
            name = "stages"
        check(
            count <= len(places),
            f"{count} feature maps asked; the network has {len(places)} {name}",
        )
        n = len(places)
        even = spread and name == "blocks"
        chosen = [n * (i + 1) // count - 1 if even else n - count + i for i in range(count)]
        self._at = [places[i] for i in chosen]
        self.widths = tuple(widths[i] for i in self._at)
        self.strides = tuple(strides[i] for i in self._at)

    def forward(self, images: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Maps (b, D, rows, columns), the finest first."""
        network: Any = self.network
        if isinstance(network, Encoder):
            first = self._at[0]
            outputs = network.intermediate(images, last=len(network.vit.blocks) - first)
            found = [outputs[i - first] for i in self._at]
            patches = [f.patches if f.norm is None else f.norm(f.patches) for f in found]
            grid = found[0].grid
            return [p.transpose(1, 2).unflatten(2, grid) for p in patches]
        made = network.forward_intermediates(
            images, indices=self._at, norm=self._normed, intermediates_only=True
        )
        return list(made)

    @property
    def _normed(self) -> bool:
        """True if the final norm is applied to the last map: if it is one, and keeps its width."""
        info: Any = self.network.feature_info
        return "num_chs_norm" not in info[-1]


def _stages(network: Any) -> tuple[list[int], list[int]]:
    """Widths and strides of all maps that a timm network gives.

    Raises:
        UserError: it gives none.
    """
    known = hasattr(network, "forward_intermediates") and hasattr(network, "feature_info")
    info = [_of(stage) for stage in network.feature_info] if known else []
    kind = type(network).__name__
    if not info or any(stage is None for stage in info):
        raise UserError(f"{kind} has no feature maps; dense evaluators need a network that has")
    found = [stage for stage in info if stage is not None]
    return [width for width, _ in found], [stride for _, stride in found]


def _of(stage: dict[str, Any]) -> tuple[int, int] | None:
    """Width and stride of a stage; None where timm does not say both."""
    width, stride = stage.get("num_chs"), stage.get("reduction")
    return (int(width), int(stride)) if width and stride else None


def _last_of_each(strides: list[int]) -> list[int]:
    """Index of the last map of each stride, the finest first."""
    return sorted({stride: i for i, stride in enumerate(strides)}.values())


def with_drop_path(old: Encoder, drop_path: float) -> Encoder:
    """Copy of an encoder, with another stochastic depth."""
    with torch.random.fork_rng(devices=[]):
        new = Encoder(replace(old.config, drop_path=drop_path), old.channels)
    new.vit.load_state_dict(old.vit.state_dict(), strict=True)
    return new


def freeze_unused(maps: FeatureMaps, channels: int, size: tuple[int, int]) -> None:
    """Train nothing that the maps do not depend on, as a norm before the classifier that is gone:
    processes that train together wait for the gradient of each trained weight.

    Found on the meta device, which computes nothing. Networks raise what they like where images of
    this size do not fit.
    """
    blank = copy.deepcopy(maps).to("meta").eval()
    made = blank(torch.zeros(1, channels, *size, device="meta"))
    named = [(name, p) for name, p in blank.named_parameters() if p.requires_grad]
    total = torch.stack([one.sum() for one in made]).sum()
    found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    unused = {name for (name, _), grad in zip(named, found, strict=True) if grad is None}
    for name, parameter in maps.named_parameters():
        if name in unused:
            parameter.requires_grad_(False)


def maps_of(backbone: Backbone, count: int = 1, spread: bool = False) -> FeatureMaps:
    """Feature maps of a backbone.

    Raises:
        UserError: raw pixels, or a network that cannot give so many maps.
    """
    check(backbone.module is not None, f"--encoder is {backbone.name!r}; raw pixels have no maps")
    assert backbone.module is not None
    try:
        return FeatureMaps(backbone.module, count, spread)
    except UserError as error:
        raise UserError(f"--encoder is {backbone.name!r}: {error}") from None
