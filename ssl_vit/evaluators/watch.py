"""Probing during training: collapse statistics, k-NN and pictures of held-out images."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_vit.common.files import write_text_atomically
from ssl_vit.common.seeds import fold
from ssl_vit.common.task import Views
from ssl_vit.data.base import known_labels
from ssl_vit.data.eval_images import EvalImages
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.order import permute
from ssl_vit.data.sources import Source, Subset
from ssl_vit.data.view import View
from ssl_vit.evaluators.features import Embed, FeatureSet, Machine, extract, pooled, ready
from ssl_vit.evaluators.knn import knn_predictions, others
from ssl_vit.evaluators.linear import LinearProtocol
from ssl_vit.evaluators.quick_scores import knn_scores, linear_scores, plain_features
from ssl_vit.evaluators.retrieval import nearest_images, same_class
from ssl_vit.evaluators.score import Score
from ssl_vit.evaluators.scores import both_outcomes, class_name, score_predictions
from ssl_vit.model.encoder import Encoder
from ssl_vit.pictures.neighbours import neighbours_panel
from ssl_vit.pictures.patch_pca import pca_panel
from ssl_vit.pictures.thumbnails import as_rgb, squared, thumbnails
from ssl_vit.training.health import health

log = logging.getLogger("ssl_vit")
Painter = Callable[[Views, Normalize], dict[str, np.ndarray]]
_PANEL_ROWS = 6
_NEIGHBOURS = 8
# Pixels of a neighbour, and of a picture in TensorBoard's projector.
_SMALL, _TINY = 96, 64
_PROJECTED = 1000


@dataclass(frozen=True)
class Look:
    """Look at an encoder.

    Attributes:
        numbers: by name, to be logged: collapse statistics, k-NN in percent.
        held_out: features of the held-out images.
        low: lower end of the 95 % interval of the best feature's k-NN score; None without labels.
        selection: what may be selected by, as the held-out images may not: k-NN score of the best
            feature, of the images that are held out for this alone. Where there are none: of the
            training images, each classified by all others. None without labels.
    """

    numbers: dict[str, float]
    held_out: FeatureSet
    low: float | None = None
    selection: float | None = None


@dataclass(frozen=True)
class Watch:
    """Watch: the data and settings with which an encoder is probed during training.

    ``labelled``: whether there are labels for k-NN; ``choice``: images with labels that are neither
    in ``train`` nor in ``val``, for ``Look.selection``; ``pooling``: the feature the method trains;
    ``drawn``: cache of small pictures between probes.
    """

    train: Source
    val: Source
    view: View
    device: torch.device
    precision: torch.dtype
    workers: int
    seed: int
    labelled: bool
    choice: Source | None = None
    pooling: str = "mean"
    drawn: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)

    def features(self, embed: Embed) -> tuple[FeatureSet | None, FeatureSet]:
        """Features of the training images (None without labels) and of the held-out ones."""
        train = self._of(self.train, embed) if self.labelled else None
        return train, self._of(self.val, embed)

    def _of(self, source: Source, embed: Embed) -> FeatureSet:
        """Features of a source."""
        machine = Machine(self.device, self.precision, self.workers)
        return extract(embed, source, self.view, machine)

    def look(self, encoder: Encoder, select: bool = False) -> Look:
        """Look at an encoder: collapse statistics of the method's feature and, with labels, k-NN
        scores in percent for all features, accuracy or, of several labels an image, mean average
        precision; and the features of the held-out images. ``select``: also what may be selected
        by."""
        ready(encoder, self.device)
        train, val = self.features(pooled(encoder))
        numbers = health(val.parts[self.pooling]) | {"held_out_images": float(len(val.index))}
        if train is None:
            return Look(numbers, val)
        bank, asked = train.known(), val.known()
        k = min(20, len(bank.labels))
        scores = knn_scores(bank, asked, (k,))
        numbers |= {f"knn{k}_{score.features}": score.value for score in scores}
        best = max(scores, key=lambda score: score.value)
        selection = self._selection(bank, encoder) if select else None
        return Look(numbers, val, best.interval[0], selection)

    def _selection(self, bank: FeatureSet, encoder: Encoder) -> float | None:
        """Selection score (``Look.selection``); ``bank``: the training images. None where there are
        too few, or no label has both outcomes."""
        if self.choice is None:
            return _leave_one_out(bank)
        asked = self._of(self.choice, pooled(encoder)).known()
        if not _decisive(asked):
            return None
        return max(score.value for score in knn_scores(bank, asked, (min(20, len(bank.labels)),)))

    def paint(
        self, painter: Painter, encoder: Encoder, held_out: FeatureSet
    ) -> dict[str, np.ndarray]:
        """Pictures of a few fixed held-out images: the method's own, PCA of their patches, and
        their nearest neighbours among the images of ``held_out``."""
        picks = permute(np.arange(min(_PANEL_ROWS, len(self.val))), len(self.val), fold(self.seed))
        images = EvalImages(self.val, self.view.size, self.view.crop_ratio, self.view.channels)
        views = images.__getitems__([int(i) for i in picks]).views
        if not views.crops:
            return {}
        keys = torch.tensor([fold(self.seed, int(i)) for i in views.keys])
        seen, display = as_rgb(views.crops[0], self.view), self.view.display(views.crops[0])
        normalize = Normalize(self.view.mean, self.view.std).to(self.device)
        ready_made = normalize(dataclasses.replace(views, keys=keys).to(self.device))
        pictures = painter(ready_made, display.to(self.device))
        with torch.inference_mode():
            tokens = encoder(ready_made.crops[0])
        pictures["pca"] = pca_panel(seen, tokens.patches.float().cpu(), tokens.grid)
        if len(held_out.index) > 1:
            pictures["neighbours"] = self._neighbours(views.keys, held_out)
        return pictures

    def _neighbours(self, places: Tensor, held_out: FeatureSet) -> np.ndarray:
        """Nearest-neighbour panel of the images at these indices, by the method's feature."""
        rows = torch.isin(held_out.index, places).nonzero()[:, 0]
        bank = held_out.parts[self.pooling]
        k = min(_NEIGHBOURS, len(bank) - 1)
        found, cosine = nearest_images(bank[rows], bank, k, own=rows)
        asked, answers = held_out.take(rows), held_out.take(found.flatten())
        same = same_class((self.val, asked), (self.val, answers))
        wanted = held_out.index[torch.cat([rows[:, None], found], dim=1)]
        small = thumbnails(self.val, wanted.flatten().tolist(), self.view, _SMALL)
        small = small.reshape(len(rows), k + 1, *small.shape[1:])
        return neighbours_panel(small[:, 0], small[:, 1:], cosine, same)

    def projection(self, held_out: FeatureSet) -> tuple[Tensor, str, list[str], np.ndarray]:
        """Projector data of at most 1,000 held-out images for TensorBoard: features, kind of
        labels, labels, pictures.

        The pictures are square, as the projector requires.
        """
        some = bounded_rows(len(held_out.index), _PROJECTED, self.seed)
        places = tuple(held_out.index[some].tolist())
        if places not in self.drawn:  # the same at every probe, and slow to read
            self.drawn.clear()
            self.drawn[places] = squared(thumbnails(self.val, places, self.view, _TINY))
        kind, labels = self._labels(held_out.labels[some])
        return held_out.parts[self.pooling][some], kind, labels, self.drawn[places]

    def _labels(self, labels: Tensor) -> tuple[str, list[str]]:
        """Kind of the labels (class, labels: several each, or unlabelled) and their texts."""
        names = self.val.classes
        if labels.ndim == 2:
            rows = [row.nonzero()[:, 0].tolist() for row in labels.nan_to_num(0) > 0]
            return "labels", [
                " + ".join(class_name(names, i) for i in row) or "none" for row in rows
            ]
        if bool((labels >= 0).any()):
            return "class", [class_name(names, i) if i >= 0 else "unknown" for i in labels.tolist()]
        return "unlabelled", ["" for _ in labels]

    def compare(self, embeds: dict[str, Embed]) -> dict[str, dict[str, Score]]:
        """Compare encoders: k-NN (k = 20) and linear score, on the method's feature if any."""
        table: dict[str, dict[str, Score]] = {}
        protocol = LinearProtocol(seed=self.seed)
        for name, embed in embeds.items():
            train, val = self.features(embed)
            assert train is not None
            train, val = train.known(), val.known()
            shown = self.pooling if self.pooling in train.parts else next(iter(train.parts))
            k = min(20, len(train.labels))
            names = self.val.classes or self.train.classes
            by_neighbours = knn_scores(train, val, (k,), (shown,), names, self.device)
            how = replace(protocol, features=(shown,))
            linear = linear_scores(train, val, how, names, self.device)
            table[name] = {"knn": by_neighbours[0], "linear": linear[0]}
        return table


def _leave_one_out(bank: FeatureSet) -> float | None:
    """k-NN score of these images by their best feature, each by all others, of other groups where
    they are known; None where there are too few, or no label has both outcomes."""
    k = min(20, others(bank))
    if k < 1 or not _decisive(bank):
        return None
    names, device = plain_features(bank), bank.labels.device
    found = knn_predictions(bank, None, (k,), names, device, shared=False)
    return max(score_predictions(each, bank.labels, None, seed=0).value for each in found)


def _decisive(asked: FeatureSet) -> bool:
    """True if these images have a score: there are some and, of several labels an image, one with
    both outcomes."""
    labels = asked.labels
    return len(labels) > 0 and (labels.ndim == 1 or bool(both_outcomes(labels).any()))


def why_no_knn(train: Source, val: Source) -> str:
    """Reason why the labels of two sources allow no k-NN; empty if they do."""
    for source in (train, val):
        if not known_labels(source).any():
            return f"{source.spec} has no labels"
    if (train.targets is None) != (val.targets is None):
        return "one set has one class an image, the other several labels"
    classes = 2 if train.labels is None else len(np.unique(train.labels[known_labels(train)]))
    return "" if classes > 1 else "the labels are all of one class"


def labelled_only(source: Source) -> Source:
    """Images of a source whose label is known; all where none is."""
    known = np.flatnonzero(known_labels(source))
    return Subset(source, known) if 0 < len(known) < len(source) else source


def bounded(source: Source, count: int, seed: int) -> Source:
    """Seeded choice of at most ``count`` images of a source."""
    if count >= len(source):
        return source
    return Subset(source, bounded_rows(len(source), count, seed))


def bounded_rows(n: int, count: int, seed: int) -> np.ndarray:
    """Seeded choice of at most ``count`` of ``n`` rows, in order."""
    if count >= n:
        return np.arange(n)
    return np.sort(permute(np.arange(count, dtype=np.int64), n, fold(seed, count)))


ScoreTable = dict[str, dict[str, Score]]


def write_scores(path: Path, table: ScoreTable, about: dict[str, object]) -> None:
    """Write a comparison as JSON, with its protocol."""
    rows = {n: {k: dataclasses.asdict(s) for k, s in r.items()} for n, r in table.items()}
    text = json.dumps(about | {"scores": rows}, indent=1)
    write_text_atomically(path, text + "\n")


def read_scores(path: Path, sha256: str) -> ScoreTable | None:
    """Read a comparison; None if missing, damaged, or of an encoder with another hash."""
    try:
        found = json.loads(path.read_text())
        if found["encoder"]["sha256"] != sha256:
            return None
        rows = found["scores"].items()
        return {name: {k: Score(**score) for k, score in row.items()} for name, row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return None
