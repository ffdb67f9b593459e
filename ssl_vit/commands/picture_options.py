"""Options of pictures."""

from __future__ import annotations

from dataclasses import dataclass, field

from ssl_vit.common.checks import check_file, check_least, check_portion, check_size
from ssl_vit.common.errors import check
from ssl_vit.common.reading import ReadConfig
from ssl_vit.options.base import Target


@dataclass(frozen=True)
class PictureConfig:
    """Options of every picture."""

    config: str = ""
    """A YAML file of these options. The command line wins."""
    encoder: str = ""
    """A run folder or a weight file of any kind that evaluate accepts. With the prefix random: the
    same architecture with random weights."""
    images: tuple[str, ...] = ()
    """Images to show: image files, or one source named as for --data.train of the other commands:
    digits:val, folder:PATH, tar:..."""
    count: int = 8
    """At most this many images of a source are shown, a seeded choice. Files are all shown."""
    size: tuple[int, ...] = ()
    """Height and width in pixels, or one number for both, that images are resized to; divisible
    by the patch size. Positions are resampled. Empty: the image size of the encoder."""
    out: str = ""
    """PNG file. Empty: a file named after the picture, as attention-images.png, in the run folder
    or beside the encoder file."""
    seed: int = 0
    """Seed of the choice of images, of masks, and of a random encoder."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    data: ReadConfig = field(default_factory=ReadConfig)

    def __post_init__(self) -> None:
        check_least(self, 1, "count")
        check_size(self, "size")
        check_file(self.out, "the picture is a PNG file", ".png")


@dataclass(frozen=True)
class GalleryData(ReadConfig):
    """Images to search."""

    train: str = ""
    """Images to find neighbours in, named as for pretraining. Empty: --images themselves, each
    without itself."""
    workers: int = -1
    """Loader processes, for more than 500 images. -1: one for each core (on the CPU, for every
    second one), at most 16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, -1, "workers")


@dataclass(frozen=True)
class NeighboursConfig(PictureConfig):
    """Nearest neighbours: images with the most similar features."""

    data: GalleryData = field(default_factory=GalleryData)
    k: int = 0
    """Neighbours shown for each image. 0: seven, or as many as there are."""
    features: str = ""
    """Feature: cls, mean, ... as in evaluate. Empty: the feature by which pretraining
    monitors the method; for other encoders cls if they have it."""
    gallery: int = 10000
    """At most this many images of --data.train are searched, a seeded choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "k")
        check_least(self, 1, "gallery")


@dataclass(frozen=True)
class AttentionConfig(PictureConfig):
    """Attention maps of the [CLS] token in the last block, for each head."""

    mass: float = 0.6
    """Share of the attention to patches that the highlighted sets of patches contain."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_portion(self, "mass")


@dataclass(frozen=True)
class ReconstructionConfig(PictureConfig):
    """Reconstructions of masked images, from a run or a file with a decoder."""

    mask_ratio: float = 0.0
    """Share of the patches that are masked. 0: as in training if known, else 0.75."""
    target: Target = "auto"
    """Target of the decoder: pixels, or patches normalized by their own mean and variance. auto: as
    the run or file states; if it does not, the one that explains these images better."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio = self.mask_ratio
        check(
            0 <= ratio < 1, f"--mask-ratio is {ratio}; it must be in (0, 1), or 0: as in training"
        )


@dataclass(frozen=True)
class PcaConfig(PictureConfig):
    """Patch PCA: principal components of patch features over all images, as colours."""


@dataclass(frozen=True)
class SimilarityConfig(PictureConfig):
    """Patch similarity: how like some marked patches all patches of an image are."""


PICTURES: dict[str, type[PictureConfig]] = {
    "attention": AttentionConfig,
    "reconstruction": ReconstructionConfig,
    "pca": PcaConfig,
    "similarity": SimilarityConfig,
    "neighbours": NeighboursConfig,
}
