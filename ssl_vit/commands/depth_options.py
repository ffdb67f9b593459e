"""Options of the depth probe as a command."""

from __future__ import annotations

from dataclasses import dataclass

from ssl_vit.commands.eval_options import EvalConfig
from ssl_vit.common.errors import check
from ssl_vit.evaluators.depth_options import DepthOptions


@dataclass(frozen=True)
class DepthConfig(DepthOptions, EvalConfig):
    """Depth probe: a head on frozen feature maps, for folders of images and depth maps.

    --data.train and --data.val are depth:FOLDER (with images/ and depth/ in
    it) or depth:IMAGES:DEPTHS, files of the same stems; a depth map is a PNG
    (16 bits), a TIFF or an NPY file. Pixels of 0, NaN or infinity have no
    depth. The first metric is delta1, in %: more is better.
    """

    def __post_init__(self) -> None:
        DepthOptions.__post_init__(self)
        EvalConfig.__post_init__(self)
        for option in ("held_out", "labels"):
            given = getattr(self.data, option)
            check(not given, f"--data.{option.replace('_', '-')} is not for depth")
