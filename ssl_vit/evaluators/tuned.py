"""Tuned networks: what fine-tuning and detection leave, reopened to be scored and used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_vit.data.base import Source
from ssl_vit.data.missing import with_data
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.view import View
from ssl_vit.evaluators.cache import content_sha256
from ssl_vit.evaluators.features import Machine, ready
from ssl_vit.evaluators.protocol import protocol_card, split_card, versions
from ssl_vit.evaluators.score import LAST, Score
from ssl_vit.evaluators.start import Start

Row = tuple[str, ...]


class Judged(NamedTuple):
    """Judged network: its scores; what a card says of the scored images (``split``) and of the
    network (``about``); pictures (height, width, 3) uint8 by name."""

    scores: list[Score]
    split: dict[str, Any]
    about: dict[str, Any]
    pictures: dict[str, np.ndarray]


class Tuned(ABC):
    """Network trained for a task, with all that scoring and using it needs.

    Attributes:
        kind: what it predicts: ``classes``, ``segment``, ``depth`` or ``detect``.
        at_once: images of a batch in evaluation.
        labelled: whether an image needs a class to be scored.
        packages: libraries that scores depend on, besides those of every evaluator.
        transform: how images are prepared, where a card would say otherwise.
        names: of the classes; None where they have none.
        setting: which weights these are, in words.
        where: its file, for messages.
    """

    kind: str
    at_once: ClassVar[int]
    labelled: ClassVar[bool] = False
    packages: tuple[str, ...] = ()
    transform: ClassVar[dict[str, Any]] = {}
    where: str = "the training images"

    def __init__(
        self,
        network: nn.Module,
        view: View,
        names: tuple[str, ...] | None,
        setting: str = LAST,
    ) -> None:
        self.network, self.view, self.names, self.setting = network, view, names, setting

    @abstractmethod
    def writer(self, path: Path, start: Start, step: int) -> Callable[[], None]:
        """Copy the weights; returns a function that writes the file. ``start``: what training
        began with; ``step``: of the training."""

    @abstractmethod
    def matched(self, source: Source) -> Source:
        """Images to score it on, with its own class numbers.

        Raises:
            UserError: it cannot be scored on these.
        """

    @abstractmethod
    def digest(self, source: Source) -> dict[str, str]:
        """Hash of what lies beside images, by its name on the card."""

    @abstractmethod
    def judge(self, source: Source, machine: Machine, seed: int) -> Judged:
        """Score on all images of a source; ``seed``: of the interval."""

    def prepared(self, image: Tensor) -> Tensor:
        """A decoded image (C, H, W), or the part of it that is looked at.

        Raises:
            BadImage: it holds no data.
        """
        return with_data(image)

    @abstractmethod
    def predict(self, images: Sequence[Tensor]) -> Any:
        """Predictions for prepared images of any sizes; on the CPU."""

    @abstractmethod
    def table(self, scores: Sequence[Score]) -> tuple[str, Row, list[Row]]:
        """Table of scores: their unit, header and rows."""

    def score_by(self, config: Any) -> None:
        """Take the options of the score from those of a run: here there are none."""
        del config

    def model(self) -> dict[str, Any]:
        """Description of the model for a card, besides its file."""
        return {}

    def numbers(self, scores: Sequence[Score]) -> dict[str, float]:
        """Scores by name."""
        return {name: value for score in scores for name, value in score.metrics.items()}

    def ready(self, device: torch.device) -> None:
        """Prepare the network: on a device, in evaluation mode."""
        ready(self.network, device)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.network.parameters()).device

    @property
    def normalize(self) -> Normalize:
        """Normalisation of its images, on its device."""
        return Normalize(self.view.mean, self.view.std).to(self.device)

    def normalized(self, images: Tensor) -> Float[Tensor, "b c h w"]:
        """Images as the network takes them, on its device."""
        return self.normalize.images(images.to(self.device))

    def about(self, start: Start, step: int) -> dict[str, Any]:
        """Metadata of its file."""
        view = self.view
        return {
            "kind": self.kind,
            "mean": view.mean,
            "std": view.std,
            "size": view.size,
            "classes": self.names,
            "setting": self.setting,
            "encoder": start.identity,
            "step": step,
        }


class Remembered(Source):
    """Training images as the file of a network remembers them: by their classes, with an image of
    each, which cannot be read; or, of several labels an image, one with all and one without any."""

    def __init__(
        self, spec: str, classes: tuple[str, ...] | None, outputs: int, several: bool = False
    ) -> None:
        self.spec, self.classes, self.count = spec, classes, 2 if several else outputs
        if several:
            self.targets = np.repeat(np.array([[0.0], [1.0]], dtype=np.float32), outputs, axis=1)
        else:
            self.labels = np.arange(outputs, dtype=np.int64)

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"{self.spec}[{i}]"


def view_of(about: dict[str, Any]) -> View:
    """View of a network, by the metadata of its file."""
    height, width = about["size"]
    mean, std = (tuple(map(float, about[name])) for name in ("mean", "std"))
    return View((height, width), len(mean), mean, std)


def names_of(about: dict[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes, by the metadata of a file."""
    given = about["classes"]
    return None if given is None else tuple(map(str, given))


def val_card(tuned: Tuned, judged: Judged, val: Source, train: Source | None) -> dict[str, Any]:
    """Card of the scored images."""
    own = split_card(val, None, content_sha256(val), train)
    return own | tuned.digest(val) | judged.split


def tuned_card(
    evaluator: str,
    tuned: Tuned,
    judged: Judged,
    identity: dict[str, Any],
    splits: tuple[Source, Source],
    machine: Machine,
    **rest: Any,
) -> dict[str, Any]:
    """Protocol card of a score. ``splits``: training and validation images."""
    train, val = splits
    card = protocol_card(
        evaluator,
        identity,
        tuned.view,
        {
            "train": split_card(train, None, content_sha256(train)) | tuned.digest(train),
            "val": val_card(tuned, judged, val, train),
        },
        **rest,
        **judged.about,
        **machine.card(),
    )
    card["transform"] |= tuned.transform
    card["versions"] = versions(tuned.packages)
    return card
