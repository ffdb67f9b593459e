"""Classifier as a tuned network: saved, reopened, scored, and used on images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_vit.common.config import EncoderConfig
from ssl_vit.data.augment import center_view
from ssl_vit.data.base import Source
from ssl_vit.data.batch import stack
from ssl_vit.data.labels import align_classes
from ssl_vit.data.missing import with_data
from ssl_vit.data.view import View
from ssl_vit.evaluators.cache import labels_sha256
from ssl_vit.evaluators.classifier import TimmCall, classifier_writer
from ssl_vit.evaluators.features import FeatureSet, Machine, extract
from ssl_vit.evaluators.online import source_targets
from ssl_vit.evaluators.score import Score
from ssl_vit.evaluators.scores import Prediction, check_labels, score_predictions
from ssl_vit.evaluators.selection import guesses_of
from ssl_vit.evaluators.start import Start, check_call
from ssl_vit.evaluators.tuned import Judged, Remembered, Row, Tuned, names_of, view_of
from ssl_vit.weights.exchange import EncoderInfo, load_strictly, read_safetensors


class TunedClasses(Tuned):
    """Fine-tuned classifier.

    Attributes:
        outputs: number of classes, or of labels.
        call: timm's call that builds it; ``encoder``: config of a plain ViT below the classifier.
        several: whether an image may have several labels.
    """

    kind, at_once, labelled = "classes", 256, True

    def __init__(
        self,
        network: nn.Module,
        view: View,
        names: tuple[str, ...] | None,
        call: TimmCall,
        outputs: int,
        several: bool,
        setting: str,
        encoder: EncoderConfig | None = None,
    ) -> None:
        super().__init__(network, view, names, setting)
        self.call, self.outputs, self.several, self.encoder = call, outputs, several, encoder

    def writer(self, path: Path, start: Start, step: int) -> Callable[[], None]:
        about = self.about(start, step) | {
            "crop_ratio": self.view.crop_ratio,
            "classes": None if self.names is None else self.names[: self.outputs],
            "several": self.several,
        }
        info = None
        if self.encoder is not None:
            view = self.view
            info = EncoderInfo(self.encoder, view.channels, view.mean, view.std, "finetune", step)
        return classifier_writer(path, self.network, self.call, about, info)

    def matched(self, source: Source) -> Source:
        known = Remembered(self.where, self.names, self.outputs, self.several)
        source = align_classes(known, source)
        names = max(known.classes or (), source.classes or (), key=len)
        check_labels(labels_of(known), labels_of(source), names)
        return source

    def digest(self, source: Source) -> dict[str, str]:
        return {}

    def guess(self, source: Source, machine: Machine) -> tuple[Tensor, FeatureSet]:
        """Predicted classes (n, at most 5), best first, or each label's probability (n, L); and
        features, of the readable images."""
        self.ready(machine.device)

        def embed(images: Tensor) -> dict[str, Tensor]:
            return {"logits": self.network(images)}

        found = extract(embed, source, self.view, machine)
        return guesses_of(found.parts["logits"], found.labels), found

    def judge(self, source: Source, machine: Machine, seed: int) -> Judged:
        guesses, found = self.guess(source, machine)
        prediction = Prediction("logits", self.setting, guesses, {})
        score = score_predictions(prediction, found.labels, self.names, seed, found.groups)
        split = {
            "images": len(found.index),
            "unreadable": found.unreadable,
            "labels_sha256": labels_sha256(found.labels),
        }
        return Judged([score], split, {}, {})

    def prepared(self, image: Tensor) -> Tensor:
        view = center_view(image, self.view.size, self.view.crop_ratio)
        return with_data(view, "the central crop")

    def predict(self, images: Sequence[Tensor]) -> Float[Tensor, "b classes"]:
        logits = self.network(self.normalized(stack(list(images)))).float().cpu()
        return logits.sigmoid() if self.several else logits.softmax(1)

    def table(self, scores: Sequence[Score]) -> tuple[str, Row, list[Row]]:
        (score,) = scores
        first, second = (f"{value:.2f}" for value in score.metrics.values())
        several = "top1" not in score.metrics
        unit, *kinds = ("score", "mAP", "AUROC") if several else ("accuracy", "top-1", "top-5")
        low, high = score.interval
        row = (score.setting, first, f"{low:.2f} to {high:.2f}", second)
        return f"{unit} in %", ("weights", kinds[0], "95%", kinds[1]), [row]

    def model(self) -> dict[str, Any]:
        return {"timm": asdict(self.call)}


def labels_of(source: Source) -> FeatureSet:
    """Labels of all images, without reading an image."""
    return FeatureSet({}, source_targets(source), 0, torch.arange(len(source)))


def open_classes(path: Path, content: dict[str, Any]) -> TunedClasses:
    """Classifier of a file; ``content``: its metadata.

    Raises:
        UserError: its tensors do not match.
    """
    about, call = content["about"], TimmCall(**content["timm"])
    check_call(call.arch, call.kwargs, str(path))
    network = call.build(0.0, 0)
    load_strictly(network, read_safetensors(path)[0], str(path))
    outputs, several = int(call.kwargs["num_classes"]), bool(about["several"])
    setting = str(about["setting"])
    shown = view_of(about), names_of(about)
    return TunedClasses(network, *shown, call, outputs, several, setting)
