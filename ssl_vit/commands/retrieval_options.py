"""Options of retrieval, and of the search for copies; none of it needs torch."""

from __future__ import annotations

from dataclasses import dataclass

from ssl_vit.commands.eval_options import FeatureConfig
from ssl_vit.common.checks import check_inside, check_least
from ssl_vit.common.errors import check


@dataclass(frozen=True)
class RetrievalConfig(FeatureConfig):
    """Retrieval by cosine: mean average precision and recall of each image of --data.val as a query
    to --data.train; without --data.val, of each training image to all others."""

    positives: str = ""
    """CSV file with the columns query and positive: names of images that belong together, a line
    for each pair. Queries are of --data.val, positives of --data.train. Empty: images of the
    query's class are its positives or, of several labels, those that share one."""
    whitening: bool = False
    """Whiten features (PCA) by the covariance of the training images, shrunk as Ledoit and Wolf."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(not self.data.held_out, "--data.held-out is not for retrieval: it chooses no setting")


@dataclass(frozen=True)
class CopiesConfig(FeatureConfig):
    """Copies: images of --data.val that are in --data.train, too, as the same file or as a
    recompressed, resized, brighter, flipped or turned one; without --data.val, training images that
    are there twice. Labels are not needed."""

    least: float = 0.8
    """Least correlation of the edges of two small pictures, in the best of eight orientations, that
    makes one image a copy of the other."""
    candidates: int = 10
    """Nearest training images by features that are looked at, of each image in each orientation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(not self.data.held_out, "--data.held-out is not for copies")
        check_inside(self, "least")
        check_least(self, 1, "candidates")
