"""Kinds of dense fine-tuning: what is learned of each pixel, by which head, loss and score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Shaped
from torch import Tensor, nn

from ssl_vit.common.errors import check
from ssl_vit.data.decode import BadImage
from ssl_vit.data.pairs import Pairs
from ssl_vit.data.view import View
from ssl_vit.evaluators.dense_tune import DenseNetwork
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.score import Score

Ready = Callable[[Tensor], Tensor]
Scored = tuple[Score, dict[str, int], dict[str, np.ndarray]]
"""Score, counts for the card, and pictures by name."""


class Kind(ABC):
    """Kind of dense fine-tuning.

    Attributes:
        maps: number of feature maps that the head takes; ``spread``: over the depth.
        unknown: target of pixels of which nothing is known.
        ratio: of a crop's sides, as factors of the image's own.
        pairs: the source of its images and maps.
        options: of the head and its score.
        names: of classes; None where there are none.
    """

    name: ClassVar[str]
    pairs: ClassVar[type[Pairs]]
    spread: ClassVar[bool]
    unknown: ClassVar[float | int]
    ratio: ClassVar[tuple[float, float]]
    maps: int
    options: Any
    names: tuple[str, ...] | None = None

    @classmethod
    @abstractmethod
    def remembered(cls, about: dict[str, Any]) -> Kind:
        """The kind that a network's file describes: its ``options``, and what was ``learned``."""

    @abstractmethod
    def learned(self) -> dict[str, Any]:
        """Values found in the training maps, for JSON."""

    @abstractmethod
    def predict(
        self, network: DenseNetwork, images: Sequence[Tensor], size: tuple[int, int], ready: Ready
    ) -> Iterator[Shaped[Tensor, "h w"]]:
        """Predictions of a network in evaluation mode for each pixel of decoded images, of any
        sizes; on the CPU. ``size``: that images are brought to; ``ready``: from a batch (b, C, H,
        W) of them to what the network takes."""

    @abstractmethod
    def head(self, widths: tuple[int, ...]) -> nn.Module:
        """Head for maps of these widths, with random weights."""

    def together(self, maps: list[Tensor]) -> Any:
        """Input of the head, made of the maps."""
        return maps

    @abstractmethod
    def prepare(self, values: Shaped[Tensor, "h w"]) -> Shaped[Tensor, "h w"]:
        """Targets of a crop, of its part of a map."""

    @abstractmethod
    def loss(self, made: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Scalars, among them ``loss``, of what the head makes of a batch (b, ...) and the targets
        (b, H, W)."""

    @abstractmethod
    def score(
        self, network: DenseNetwork, pairs: Pairs, view: View, machine: Machine, seed: int
    ) -> Scored:
        """Score of a network in evaluation mode on all images."""

    @abstractmethod
    def about(self) -> str:
        """Head, and what it predicts, in words."""


def of_all(pairs: Pairs, of: Callable[[Tensor], Any]) -> Iterator[Any]:
    """Results of ``of`` for every readable map, by threads.

    Raises:
        UserError: none can be read.
    """

    def read(i: int) -> Any:
        try:
            return of(pairs.target(i))
        except BadImage:
            return None

    with ThreadPoolExecutor() as pool:
        found = [made for made in pool.map(read, range(len(pairs))) if made is not None]
    check(bool(found), f"no map beside the images of {pairs.spec} can be read")
    return iter(found)
