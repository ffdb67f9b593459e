"""Draws of mixed sources: how often the images of each are drawn, and which at which place."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64

from ssl_vit.common.seeds import fold
from ssl_vit.data.order import permute


@dataclass(frozen=True)
class Mix:
    """Mix of sources.

    Attributes:
        names: of the sources.
        weights: how often the images of each are drawn in an epoch, on average.
        of: int32 (n,), the source of each image.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    of: np.ndarray

    def take(self, indices: np.ndarray) -> Mix:
        """The mix of the images at these indices."""
        return replace(self, of=self.of[indices])

    @property
    def counts(self) -> list[int]:
        """Images of each source."""
        return np.bincount(self.of, minlength=len(self.names)).tolist()

    @property
    def draws(self) -> list[int]:
        """Draws of each source in an epoch."""
        both = zip(self.counts, self.weights, strict=True)
        return [max(1, round(weight * count)) if count else 0 for count, weight in both]

    @property
    def even(self) -> bool:
        """True if every image is drawn once an epoch, as without a mix."""
        return all(weight == 1 for weight in self.weights)

    def about(self) -> str:
        """Sources with their images, weights and shares of an epoch, in a line."""
        total = sum(self.draws)
        return "; ".join(
            f"{name}: {count:,} images x {weight:g} = {100 * draws / total:.3g} %"
            for name, count, weight, draws in zip(
                self.names, self.counts, self.weights, self.draws, strict=True
            )
        )


class Draws:
    """Draws of an epoch: the image at each of its places, a function of (seed, epoch, place).

    The m images of a source of weight w are drawn along an endless sequence: a permutation of them,
    then another one, and so on; each epoch takes the next round(w m) of it. So after any number of
    epochs all are drawn equally often but for one draw: of weight 2 twice in every epoch; of weight
    0.5 a random half in one epoch, and the other half in the next.
    """

    def __init__(self, mix: Mix, seed: int) -> None:
        self.images_of = [np.flatnonzero(mix.of == i) for i in range(len(mix.names))]
        self.counts, self.seed = mix.draws, fold(seed, len(mix.of))
        self.ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def at(self, epoch: int, places: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
        """Image at each of these places of an epoch."""
        found = np.empty(len(places), dtype=np.int64)
        source = np.searchsorted(self.ends, places, side="right")
        for i in np.unique(source).tolist():
            images, count = self.images_of[i], self.counts[i]
            along = epoch * count + places - (int(self.ends[i]) - count)
            rounds, within = np.divmod(along, len(images))
            for n in np.unique(rounds[source == i]).tolist():
                own = (source == i) & (rounds == n)
                key = fold(self.seed, i, n)
                found[own] = images[permute(within[own], len(images), key)]
        return found
