"""Evaluation setup from the options: encoder, labelled images, cached features, protocol card."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_vit.commands.eval_options import EvalConfig, EvalData, FeatureConfig
from ssl_vit.common.errors import check
from ssl_vit.data.base import describe_labels, known_labels
from ssl_vit.data.groups import leaks
from ssl_vit.data.labels import align_classes
from ssl_vit.data.sources import Source, Subset, open_source
from ssl_vit.data.statistics import FEW, survey
from ssl_vit.evaluators.backbone import Backbone, open_backbone, result_file
from ssl_vit.evaluators.cache import ALL_UP_TO, cached, content_sha256, contents
from ssl_vit.evaluators.features import (
    Embed,
    FeatureSet,
    Machine,
    extract_shared,
    ready,
    units_of,
)
from ssl_vit.evaluators.options import parts_of
from ssl_vit.evaluators.protocol import protocol_card, split_card
from ssl_vit.model.encoder import Encoder
from ssl_vit.training.parallel import Parallel, resolve_precision, start_parallel

log = logging.getLogger("ssl_vit")


# Up to this many bytes, all features of an encoder are extracted, also those for other evaluators.
_ALL_PARTS = 2 << 30


class Evaluation:
    """Evaluation: one encoder and its labelled images; features are extracted on first use.

    ``names``: the features to evaluate: those of ``--features``, or all that the encoder has.
    """

    def __init__(
        self,
        config: EvalConfig,
        needs_val: bool = True,
        plain: bool = False,
        labelled: bool = True,
    ) -> None:
        """Open the images and the encoder; nothing is written.

        Args:
            needs_val: whether a validation set is required.
            plain: without ``--features``, use those that are not concatenations.
            labelled: whether images need labels; those without are then left out.

        Raises:
            UserError: an option is missing, images have no labels, or options contradict.
        """
        check(bool(config.encoder), "--encoder is missing")
        check(bool(config.data.train), "--data.train is missing")
        check(bool(config.data.val) or not needs_val, "--data.val is missing")
        self.config = config
        self.started = time.perf_counter()
        self.backbone: Backbone = open_backbone(config.encoder, config.seed, config.size)
        self.sources = open_sources(config.data, self.backbone.view.channels, labelled)
        self.parallel: Parallel = start_parallel(config.device)
        self.device = self.parallel.device
        self.precision = resolve_precision(config.precision, self.device)
        how = (config.data.workers, config.batch_size)
        self.machine = Machine(self.device, self.precision, *how)
        look_at(self.sources["train"], self.backbone, config.seed)
        if self.backbone.module is not None:
            ready(self.backbone.module, self.device)
        self.names = self._named(plain)
        for name, source in self.sources.items() if labelled else ():
            log.info("labels of --data.%s: %s", name.replace("_", "-"), describe_labels(source))
        options = {f"data.{n.replace('_', '-')}": source for n, source in self.sources.items()}
        for line in leaks(options):
            log.warning("warning: %s", line)
        self._features: dict[str, FeatureSet] = {}
        self._content: dict[str, str] = {}
        self._images: dict[str, list[bytes]] = {}

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes or labels, of the set that has most."""
        known = [s.classes for s in self.sources.values() if s.classes is not None]
        return max(known, key=len, default=None)

    def _named(self, plain: bool) -> tuple[str, ...]:
        """Features of ``--features``, or all that this encoder has.

        Raises:
            UserError: the encoder lacks one of ``--features``.
        """
        asked = self.config.features if isinstance(self.config, FeatureConfig) else ()
        given = self.backbone.features
        strange = [f for f in asked if f not in given]
        check(
            not strange,
            f"--features has {strange}; {self.config.encoder} has {', '.join(given)}",
        )
        return asked or (self.backbone.poolings if plain else given)

    def features(self, split: str) -> FeatureSet:
        """Features of ``train``, ``val`` or ``held_out``, from the cache or extracted now."""
        if split not in self._features:
            self._features[split] = self.extract(self.sources[split], self.content(split))
        return self._features[split]

    def read(self, split: str, rows: FeatureSet) -> None:
        """Note the readable images of a split, for the card, where they were read otherwise."""
        self._features[split] = rows

    def extract(self, source: Source, content: str = "") -> FeatureSet:
        """Features of a source; ``content``: its ``content_sha256`` if known already."""
        backbone = self.backbone
        parts = parts_of(backbone.features)
        width = backbone.module.width if isinstance(backbone.module, Encoder) else 0
        if 4 * len(source) * width * len(parts) > _ALL_PARTS:
            parts = parts_of(self.names)
        return self.embedded(backbone.embed(parts), parts, source, content)

    def embedded(
        self, embed: Embed, parts: tuple[str, ...], source: Source, content: str = ""
    ) -> FeatureSet:
        """Outputs of ``embed`` for the images of a source, from the cache or computed now;
        ``parts``: names that identify them in the cache."""
        backbone = self.backbone

        def make() -> FeatureSet:
            return extract_shared(embed, source, backbone.view, self.machine)

        if not (isinstance(self.config, FeatureConfig) and self.config.cache):
            return make()
        about = {
            "weights": backbone.identity.get("weights_sha256", "none"),
            "network": backbone.network,
            "parts": parts,
            "view": asdict(backbone.view),
            "reading": source.reading.content,
            "device": self.device.type,
            "precision": str(self.precision),
            "content": content or content_sha256(source),
            "torch": torch.__version__,
            "source": source.spec,
        }
        found = cached(about, make, self.parallel.main, self.parallel.any)
        return replace(found, groups=units_of(source, found.index))

    def content(self, split: str) -> str:
        """Content hash of a split's images."""
        if split not in self._content:
            found = contents(self.sources[split])
            self._images[split] = [content for content, readable in found if readable]
            self._content[split] = content_sha256(self.sources[split], found)
        return self._content[split]

    def identical(self) -> int:
        """Validation images that are training images, too, byte for byte; 0 where not all are
        compared, as there are too many."""
        if max(map(len, self.sources.values())) > ALL_UP_TO:
            return 0
        train = set(self._images["train"])
        return sum(content in train for content in self._images["val"])

    def card(self, evaluator: str, **rest: Any) -> dict[str, Any]:
        """Protocol card of the evaluation."""
        train = self.sources["train"]
        splits = {
            name: split_card(source, self._features.get(name), self.content(name), train)
            for name, source in self.sources.items()
        }
        repeated = "val" in splits and warn_same_images(self.content("train"), self.content("val"))
        if "val" in splits and not repeated and (same := self.identical()):
            splits["val"]["identical_in_training"] = same
            text = (
                "warning: %s of %s images of --data.val are in --data.train, too, byte for byte: "
            )
            text += "scores are too good; evaluate copies names them, and those that look alike"
            log.warning(text, f"{same:,}", f"{splits['val']['images']:,}")
        return protocol_card(
            evaluator,
            self.backbone.identity,
            self.backbone.view,
            splits,
            options=asdict(self.config),
            **rest,
            **self.machine.card(),
            processes=self.parallel.world,
            seconds=round(time.perf_counter() - self.started, 1),
        )

    def out(self, evaluator: str) -> Path:
        """Path of the result file."""
        return result_file(self.config.out, self.backbone, f"{evaluator}.json")


def warn_same_images(train: str, val: str) -> bool:
    """True if training and validation images are the same, by their content hashes; warns of it."""
    if train == val:
        log.warning(
            "warning: --data.val and --data.train are the same images: the score is no test"
        )
    return train == val


def look_at(source: Source, backbone: Backbone, seed: int = 0) -> None:
    """Look at some images of a source before an encoder is given them: a warning if their values
    are far from those that it was trained on.

    Raises:
        UserError: none is readable, or they have other channels than the encoder takes.
    """
    found = survey(source, backbone.view.channels, seed, FEW)
    found.check(f"--encoder {backbone.name}")
    if wrong := found.misfit(backbone.view.mean, backbone.view.std):
        remedy = "scale them as the images were that it was trained on"
        log.warning("warning: the images of %s %s; %s", source.spec, wrong, remedy)


def open_sources(data: EvalData, channels: int, labelled: bool = True) -> dict[str, Source]:
    """Sources of an evaluation: ``train``, and ``val`` and ``held_out`` if given.

    Args:
        channels: those of the encoder.
        labelled: whether labels are needed; images without one are then left out.

    Raises:
        UserError: one has no labels, or their classes differ.
    """
    sources: dict[str, Source] = {}
    for name in ("train", "val", "held_out"):
        spec = getattr(data, name)
        if spec:
            option = f"--data.{name.replace('_', '-')}"
            source = open_source(spec, data, channels)
            if not labelled:
                sources[name] = source
                continue
            source = with_labels(source, option)
            sources[name] = align_classes(sources["train"], source) if sources else source
    return sources


def with_labels(source: Source, option: str) -> Source:
    """Images of a source that have a label; it is logged if some have none.

    Raises:
        UserError: none has; the line says what was looked for, and what to give.
    """
    about, known = describe_labels(source), known_labels(source)
    check(
        bool(known.any()),
        f"{option} {source.spec} has no labels ({about}); give class folders, or --data.labels CSV",
    )
    if known.all():
        return source
    count = f"{len(known) - int(known.sum()):,} of {len(known):,}"
    log.warning("warning: %s: %s images have no label and are left out", option, count)
    return Subset(source, np.flatnonzero(known))
