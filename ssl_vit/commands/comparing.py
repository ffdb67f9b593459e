"""Evaluators of a comparison: what each does to one encoder, by name.

Another one is a name in ``compare_options.Evaluator`` and a function here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ssl_vit.commands import finetuning as finetune
from ssl_vit.commands.attentive import attentive
from ssl_vit.commands.attentive_options import AttentiveConfig
from ssl_vit.commands.compare_options import CompareConfig
from ssl_vit.commands.dense_probes import depth, segment
from ssl_vit.commands.depth_options import DepthConfig
from ssl_vit.commands.eval_options import FeatureConfig, KnnConfig, LinearConfig, SegmentConfig
from ssl_vit.commands.evaluating import Evaluation
from ssl_vit.commands.probes import Result, best_pooling, knn, linear
from ssl_vit.commands.retrieval import retrieval
from ssl_vit.commands.retrieval_options import RetrievalConfig
from ssl_vit.common.errors import RunFailed
from ssl_vit.common.reading import ReadConfig
from ssl_vit.evaluators.score import Score


@dataclass(frozen=True)
class Entry:
    """Encoder to measure: its spec, a folder for what the evaluator leaves, and the comparison."""

    config: CompareConfig
    encoder: str
    folder: Path

    @property
    def shared(self) -> dict[str, Any]:
        """Options that every evaluator of one encoder has."""
        keys = ("data", "size", "seed", "device", "precision")
        return {key: getattr(self.config, key) for key in keys} | {"encoder": self.encoder}

    @property
    def is_pixels(self) -> bool:
        """True for raw pixels: without tokens, and nothing to train."""
        return self.encoder.startswith("pixels:")


def _by_neighbours(entry: Entry) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Options without held-out images, as nothing is chosen on them, and the best pooling."""
    shared = entry.shared | {"data": replace(entry.config.data, held_out="")}
    return shared, (best_pooling(Evaluation(FeatureConfig(**shared), plain=True)),)


def _knn(entry: Entry) -> Result:
    shared, features = _by_neighbours(entry)
    return knn(KnnConfig(**shared, k=(20,), features=features))


def _retrieval(entry: Entry) -> Result:
    shared, features = _by_neighbours(entry)
    return retrieval(RetrievalConfig(**shared, features=features))


def _linear(entry: Entry, protocol: Any) -> Result:
    return linear(LinearConfig(**entry.shared, protocol=protocol))


def _attentive(entry: Entry) -> Result | None:
    return None if entry.is_pixels else attentive(AttentiveConfig(**entry.shared))


def _segment(entry: Entry) -> Result:
    return segment(SegmentConfig(**entry.shared))


def _depth(entry: Entry) -> Result | None:
    return None if entry.is_pixels else depth(DepthConfig(**entry.shared))


def _finetune(entry: Entry) -> Result | None:
    return _trained(entry, "fine-tuning", finetune.main, "tune", finetune.CARD_FILE)


def _detect(entry: Entry) -> Result | None:
    from ssl_vit.commands import detecting  # it needs pycocotools

    return _trained(entry, "detection", detecting.main, "detect", detecting.CARD_FILE)


def _trained(
    entry: Entry, what: str, run: Callable[[list[str]], int], group: str, file: str
) -> Result | None:
    """Result of a run that trains the encoder, or on it; None for raw pixels."""
    if entry.is_pixels:
        return None
    path = entry.folder / file
    if run(run_options(entry.config, entry.encoder, entry.folder, group)):
        raise RunFailed(f"{entry.folder}: {what} was stopped; the same command resumes it")
    card = json.loads(path.read_text())
    return [Score(**score) for score in card.pop("scores")], card, path


MEASURES: dict[str, Callable[[Entry], Result | None]] = {
    "knn": _knn,
    "linear": partial(_linear, protocol="fast"),
    "logreg": partial(_linear, protocol="logreg"),
    "attentive": _attentive,
    "retrieval": _retrieval,
    "segment": _segment,
    "depth": _depth,
    "detect": _detect,
    "finetune": _finetune,
}


def measure(config: CompareConfig, encoder: str, evaluator: str, folder: Path) -> Result | None:
    """Result of one encoder by one evaluator; None if the evaluator does not apply to it."""
    return MEASURES[evaluator](Entry(config, encoder, folder))


def run_options(config: CompareConfig, encoder: str, folder: Path, group: str) -> list[str]:
    """Command line options of a run on one encoder. ``group``: that of the image size."""
    options = ["--config", config.recipe] if config.recipe else []
    options += ["--encoder", encoder, "--run.out", str(folder)]
    options += ["--data.train", config.data.train, "--data.val", config.data.val]
    options += [f"--{group}.image-size", *map(str, config.size)] if config.size else []
    for option in fields(ReadConfig):
        given = getattr(config.data, option.name)
        texts = map(str, given) if isinstance(given, tuple) else [str(given)]
        options += [f"--data.{option.name.replace('_', '-')}", *texts]
    options += ["--data.workers", str(config.data.workers), "--run.seed", str(config.seed)]
    return [*options, "--run.device", config.device, "--run.precision", config.precision]
