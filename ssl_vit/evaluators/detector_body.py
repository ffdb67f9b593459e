"""Encoder below a detector: feature maps of a frozen or trained network for images of one size."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_vit.common.errors import UserError, check
from ssl_vit.evaluators.backbone import check_patches
from ssl_vit.evaluators.maps import FeatureMaps, freeze_unused, with_drop_path
from ssl_vit.evaluators.start import Start
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.windows import use_windows


class DetectorBody(nn.Module):
    """Encoder below a detector: images to feature maps, the finest first.

    A ``frozen`` body stays in evaluation mode and gets no gradient; so do BatchNorm layers of any
    other.

    Attributes:
        strides: in pixels, of the maps that a detector sees.
        coarsest: stride in pixels of which an image must fill one at least.
    """

    def __init__(self, body: FeatureMaps, frozen: bool) -> None:
        super().__init__()
        self.body, self.frozen = body, frozen
        self.strides = tuple(map(float, body.strides))
        self.coarsest = self.strides[-1]
        self.body.requires_grad_(not frozen)
        for part in self.norms():
            part.requires_grad_(False)

    def norms(self) -> list[nn.Module]:
        """BatchNorm layers, whose statistics are those of pretraining."""
        return [p for p in self.body.modules() if isinstance(p, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True) -> DetectorBody:
        """Training mode of what is trained."""
        super().train(mode)
        for part in [self.body] if self.frozen else self.norms():
            part.eval()
        return self

    def maps(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Feature maps."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            found: list[Tensor] = self.body(images)
        return found

    def forward(self, images: Float[Tensor, "b c h w"]) -> Any:
        """Feature maps, all that a detector sees of the images."""
        return self.maps(images)


def body_of(
    start: Start,
    size: tuple[int, int],
    levels: int,
    windows: int = 0,
    global_blocks: int = 4,
    drop_path: float = 0.0,
    frozen: bool = False,
) -> FeatureMaps:
    """Maps of an encoder, whose weights are copied, for images of ``size``: of a plain ViT its last
    one, of a network with stages those of the last ``levels``. A ``frozen`` one drops nothing.

    Raises:
        UserError: a size, windows or stochastic depth that the network does not allow; or it has no
            maps.
    """
    given = start.identity["given"]
    if not isinstance(start.module, Encoder):
        check(not windows, f"--detect.windows is {windows}; it is for plain ViTs, not {given}")
        return _of_network(start, size, levels)
    encoder = with_drop_path(start.module, 0.0 if frozen else drop_path)
    patch = encoder.patch_size
    check_patches("--detect.image-size", size, patch)
    if windows:
        use_windows(encoder, (size[0] // patch, size[1] // patch), windows, global_blocks)
    return FeatureMaps(encoder)


def _of_network(start: Start, size: tuple[int, int], levels: int) -> FeatureMaps:
    """Maps of a network of timm that is no plain ViT: of its last stages or, where there are too
    few, of its last one alone.

    Raises:
        UserError: it gives none, or does not take the size.
    """
    network, given = copy.deepcopy(start.module), start.identity["given"]
    set_image_size(network, size, "--detect.image-size", given)
    try:
        last = FeatureMaps(network)
    except UserError as error:
        raise UserError(f"--encoder is {given!r}: {error}") from None
    try:
        found = FeatureMaps(network, levels)
    except UserError:
        return last
    return found if len(set(found.strides)) == levels else last


def set_image_size(network: Any, size: tuple[int, int], option: str, given: str) -> None:
    """Set the image size of a network of timm that is built for one; windows of attention stay as
    they are, where the network says them.

    Raises:
        UserError: the network, ``given`` by the user, does not take the size that ``option`` has.
    """
    if not hasattr(network, "set_input_size"):
        return
    own = [getattr(part, "window_size", None) for part in network.modules()]
    windows = next((w for w in own if isinstance(w, tuple) and len(w) == 2 and min(w) > 0), None)
    try:
        try:
            network.set_input_size(img_size=size, window_size=windows)
        except TypeError:
            network.set_input_size(img_size=size)
    except (AssertionError, ValueError, RuntimeError) as error:
        shown, why = "x".join(map(str, size)), " ".join(str(error).split())[:120]
        raise UserError(f"{option} is {shown}; {given} does not take it: {why}") from None


def checked(made: DetectorBody, channels: int, size: tuple[int, int]) -> None:
    """Check that images of this size fill a pixel of each map, and train what these depend on.

    Below the coarsest stride some networks, which round up, still do; so it is tried, on the meta
    device, which computes nothing.

    Raises:
        UserError: they do not.
    """
    if min(size) < made.coarsest:
        blank = copy.deepcopy(made).to("meta").eval()
        try:
            with torch.no_grad():
                blank(torch.zeros(1, channels, *size, device="meta"))
        except RuntimeError:
            shown = "x".join(map(str, size))
            raise UserError(
                f"--detect.image-size is {shown}; both must be {made.coarsest:g} or more, the "
                "stride of the coarsest level"
            ) from None
    if not made.frozen:
        freeze_unused(made.body, channels, size)
