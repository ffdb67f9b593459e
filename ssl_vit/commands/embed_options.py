"""Options of embedding: images, encoder, features, and the file they are written to."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ssl_vit.common.checks import check_features, check_file, check_least, check_size
from ssl_vit.common.errors import check
from ssl_vit.common.reading import ReadConfig
from ssl_vit.evaluators.options import FEATURES, PATCHES, check_format


@dataclass(frozen=True)
class EmbedData(ReadConfig):
    """Images whose features are computed, and how they are read."""

    train: str = ""
    """Images, with labels or without, named as for pretraining: folder:PATH, flat:PATH, tar:...,
    torchvision:..., hf:..."""
    workers: int = -1
    """Loader processes. -1: one for each core (on the CPU, for every second one), at most 16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, -1, "workers")


@dataclass(frozen=True)
class EmbedConfig:
    """Features of images to a file, with their names and labels, and a card of how they were made.

    The same command goes on where it was killed.
    """

    config: str = ""
    """A YAML file of these options. The command line wins."""
    data: EmbedData = field(default_factory=EmbedData)
    encoder: str = ""
    """A run folder or a weight file, as for evaluate; it says the channels of the images."""
    features: tuple[str, ...] = ()
    """Features: cls, mean, patches (all patch tokens), and others as for evaluate. Empty: cls and
    mean, where the encoder has them; for .npy, which holds one array, cls, or mean without it."""
    size: tuple[int, ...] = ()
    """Height and width in pixels, or one number for both, that images are resized to; positions
    are resampled. Empty: the image size of the encoder."""
    out: str = ""
    """File to write: .npz (numpy), .parquet (pandas, pyarrow; needs pyarrow) or .npy, with names
    and labels in .npy.csv and the card in .npy.json beside it."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on with what the same command left in OUT.partial, and replace no file. never: begin
    anew, and replace the file when the new one is complete."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16, fp32 or auto, as in pretraining. Features are written in fp32."""
    batch_size: int = 256
    """Images per forward pass of the encoder."""

    def __post_init__(self) -> None:
        check_least(self, 1, "batch_size")
        check_size(self, "size")
        allowed = ["cls", "mean", PATCHES, *(n for n in FEATURES if n not in ("cls", "mean"))]
        check_features(self.features, allowed)
        if self.out:
            check_format(self.out)


def check_place(out: Path) -> None:
    """Check, before the work, that a file can be written.

    Raises:
        UserError: it cannot.
    """
    folder = out.absolute().parent
    check(not out.is_dir(), f"--out is {str(out)!r}, a folder; name a file")
    check_file(str(out))
    usable = os.access(folder, os.W_OK)
    check(usable, f"--out is {str(out)!r}; nothing can be written to {str(folder)!r}")
