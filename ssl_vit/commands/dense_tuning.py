"""Dense fine-tuning: ``evaluate finetune`` of images with masks or depth maps beside them."""

from __future__ import annotations

import functools
import hashlib
import shlex
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from ssl_vit.commands.cli import show_table
from ssl_vit.common.errors import check
from ssl_vit.common.figures import save_png
from ssl_vit.common.reading import beside
from ssl_vit.common.task import Task
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.base import Source
from ssl_vit.data.dense import DenseImages
from ssl_vit.data.depths import DepthPairs
from ssl_vit.data.images import Given, open_images
from ssl_vit.data.pairs import PairImages, Pairs, pairs_of, whole_pairs
from ssl_vit.data.view import View
from ssl_vit.evaluators.backbone import check_patches
from ssl_vit.evaluators.cache import content_sha256
from ssl_vit.evaluators.classifier import MODEL_FILE, saved_step
from ssl_vit.evaluators.dense_kinds import DepthKind, Kind, Scored, SegmentKind
from ssl_vit.evaluators.dense_tune import DenseNetwork, DenseTune, train_what_counts, trainable
from ssl_vit.evaluators.features import Machine, ready
from ssl_vit.evaluators.maps import FeatureMaps
from ssl_vit.evaluators.options import FinetuneConfig
from ssl_vit.evaluators.protocol import protocol_card, split_card, write_card
from ssl_vit.evaluators.pyramid import set_image_size
from ssl_vit.evaluators.score import UNITS
from ssl_vit.evaluators.start import Start
from ssl_vit.evaluators.watch import bounded
from ssl_vit.model.encoder import Encoder
from ssl_vit.pictures.boundaries import evenly
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.session import Session, counted
from ssl_vit.weights.exchange import HEAD, EncoderInfo, contiguous_state, sha256, write_own

CARD_FILE = "finetune.json"
_AT_ONCE = 16  # images of a batch in evaluation
_LOOKED = 64


def check_options(config: FinetuneConfig) -> None:
    """Check that options of classes of images are not given for pixels.

    Raises:
        UserError: one is.
    """
    tune, spec = config.tune, config.data.train
    off = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "erasing": 0.0, "randaugment": "none"}
    off |= {"ema": 0.0, "pooling": "mean"}
    for option, none in off.items():
        given = getattr(tune, option)
        flag = f"--tune.{option.replace('_', '-')}"
        check(given == none, f"{flag} is {given}; of {spec} pixels are learned: leave it out")
    check(not config.data.labels, f"--data.labels is not for {spec}, of which pixels are learned")
    val = config.data.val
    right = not val or beside(val) == config.dense
    check(right, f"--data.val is {val!r}; --data.train is {config.dense}:: both must be")


class DenseTuning(Session):
    """Dense fine-tuning run: an encoder and a head on its feature maps, trained together."""

    task: DenseTune

    def __init__(self, config: FinetuneConfig, start: Start) -> None:
        own = Given(f"--encoder {config.encoder}", start.mean, start.std)
        given = None if config.encoder == "none" else own
        images = open_images(config.data, config.run.seed, given)
        check(images.held_out, "--data.val is missing, and --data.holdout holds no image out")
        self.start, tune, size = start, config.tune, config.tune.image_size
        self.kind = kind_of(config, images.train, images.val)
        self.size = (size[0], size[-1]) if size else start.size
        module, option = trainable(start.module, tune.drop_path), "--tune.image-size"
        if isinstance(module, Encoder):
            check_patches(option, self.size, module.patch_size)
        else:
            set_image_size(module, self.size, option, start.identity["given"])
        maps = FeatureMaps(module, self.kind.maps, self.kind.spread)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            head = self.kind.head(maps.widths)
        network = DenseNetwork(maps, head, self.kind.together)
        channels = config.data.channels
        train_what_counts(network, self.size, channels)
        crop = Crop(
            self.size,
            scale=tune.crop_scale,
            ratio=self.kind.ratio,
            flip=tune.flip,
            vertical_flip=tune.vertical_flip,
            quarter_turns=tune.quarter_turns,
            relative=True,
        )
        task = DenseTune(network, self.kind.loss, tune.layer_decay)
        super().__init__("finetune", config, task, ViewSpec((crop,)), images)
        self.view = View(self.size, channels, images.mean, images.std)
        precision, workers = self.trainer.precision, config.data.workers
        self.machine = Machine(self.parallel.device, precision, workers, _AT_ONCE)

    def training_images(self) -> DenseImages:
        """Training crops with their targets."""
        images, kind, seed = self.images, self.kind, self.config.run.seed
        shared = images.train, self.views, self.config.data.channels, seed
        return DenseImages(*shared, kind.prepare, kind.unknown, images.cache)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """That of the images and their maps, and the encoder."""
        digest = hashlib.sha256()
        for source in (self.images.train, self.images.val):
            digest.update(content_sha256(pairs_of(source).masks).encode())
        return {
            **self.images.fingerprint,
            "labels": digest.hexdigest(),
            "weights": self.start.weights,
        }

    def export(self, whole: Task) -> Callable[[], object]:
        """Snapshot of the network; the returned function writes its file, which opens as an encoder
        of a plain ViT."""
        assert isinstance(whole, DenseTune)
        network, images = whole.network, self.images
        inner: Any = network.maps.network
        plain = isinstance(inner, Encoder)
        tensors = contiguous_state(inner.vit if plain else inner)
        head = contiguous_state(network.head)
        tensors |= {f"{HEAD}{name}": value for name, value in head.items()}
        about = {
            "mean": images.mean,
            "std": images.std,
            "size": self.size,
            "kind": self.kind.name,
            "head": self.kind.about(),
            "encoder": self.start.identity,
            "step": self.trainer.step,
        }
        content: dict[str, Any] = {"about": about}
        if plain:
            channels, step = self.config.data.channels, self.trainer.step
            info = EncoderInfo(inner.config, channels, images.mean, images.std, self.name, step)
            content["info"] = asdict(info)
        path = self.out / MODEL_FILE
        return lambda: write_own(path, tensors, content)

    def exported_step(self) -> int | None:
        """Step of the model file; None: there is no file."""
        return saved_step(self.out / MODEL_FILE)

    def probe(self, whole: Task, step: int, log: RunLog) -> None:
        """Evaluation during training, on a bounded number of held-out images."""
        assert isinstance(whole, DenseTune)
        run = self.config.run
        some = bounded(self.images.val, run.probe_images, run.seed)
        score, _, pictures = self.judge(whole, some)
        log.write(step, {f"val_{name}": value for name, value in score.metrics.items()}, "probe")
        for name, picture in pictures.items():
            log.picture(step, name, picture)

    def judge(self, task: DenseTune, source: Source) -> Scored:
        """Score of the network on all images of a source."""
        ready(task.network, self.parallel.device)
        pairs, seed = pairs_of(source), self.config.run.seed
        return self.kind.score(task.network, pairs, self.view, self.machine, seed)

    def card(self, count: dict[str, int]) -> dict[str, Any]:
        """Protocol card of the score."""
        path, splits = self.out / MODEL_FILE, {}
        for name, source in (("train", self.images.train), ("val", self.images.val)):
            other = self.images.train if name == "val" else None
            own = split_card(source, None, content_sha256(source), other)
            key = "depth_sha256" if self.kind.name == "depth" else "masks_sha256"
            splits[name] = own | {key: content_sha256(pairs_of(source).masks)}
        return protocol_card(
            "finetune",
            self.start.identity,
            self.view,
            splits,
            options=asdict(self.config),
            model={"file": str(path), "sha256": sha256(path), "head": self.kind.about()},
            pairs=count,
            step=self.trainer.step,
            **self.machine.card(),
        )

    def about(self) -> list[tuple[str, str]]:
        """Plan rows on the network and its recipe."""
        tune, maps = self.config.tune, self.task.network.maps
        weights = "trained on" if self.start.pretrained else "random"
        strides = ", ".join(map(str, maps.strides))
        return [
            ("head", f"{self.kind.about()}; on maps of strides {strides}"),
            ("weights", f"{self.start.identity['given']}: {weights}"),
            ("parameters", f"{counted(maps)} encoder, {counted(self.task)} in all"),
            ("rates", f"layer decay {tune.layer_decay:g}, drop path {tune.drop_path:g}"),
        ]


def check_sizes(pairs: Pairs, channels: int) -> None:
    """Check that maps are as large as their images, of some evenly spread.

    Raises:
        UserError: one is not.
    """
    PairImages(pairs, (8, 8), channels).__getitems__(evenly(len(pairs), _LOOKED))


def kind_of(config: FinetuneConfig, train: Source, val: Source) -> Kind:
    """Kind of dense fine-tuning of these images.

    Raises:
        UserError: they do not allow it.
    """
    for source in (train, val):
        whole = whole_pairs(source)
        if isinstance(whole, DepthPairs):
            whole.scale = config.depth.scale  # before any part of them is taken
    ours, theirs = pairs_of(train), pairs_of(val)
    for pairs in (ours, theirs):
        check_sizes(pairs, config.data.channels)
    if config.dense == "pairs":
        return SegmentKind(config.segment, ours, theirs)
    assert isinstance(ours, DepthPairs)
    assert isinstance(theirs, DepthPairs)
    return DepthKind(config.depth, ours, theirs)


def show_results(session: DenseTuning) -> dict[str, float]:
    """Print the score of the final weights and the files of the run; returns the score."""
    score, count, pictures = session.judge(session.task, session.images.val)
    card = session.card(count)
    session.guard()
    write_card(session.out / CARD_FILE, card, [score])
    for name, picture in pictures.items():
        save_png(session.out / f"{name}.png", picture)
    n, m = count["val"], len(session.images.train)
    title = f"finetune: {session.config.encoder}, {n:,} evaluation and {m:,} training images, in %"
    units = "".join(f" ({name}: {UNITS[name]})" for name in score.metrics if name in UNITS)
    low, high = score.interval
    values = (f"{v:.{4 if k in UNITS else 2}f}" for k, v in score.metrics.items())
    first = next(iter(score.metrics))
    header = ("weights", *score.metrics, f"95% of {first}")
    row = (score.setting, *values, f"{low:.2f} to {high:.2f}")
    show_table(title + units, [row], header=header)
    print(f"model:    {session.out / MODEL_FILE}")
    for name in pictures:
        print(f"{name}: {session.out / name}.png")
    print(f"protocol and scores: {session.out / CARD_FILE}")
    print(f"curves:   tensorboard --logdir {shlex.quote(str(session.out))}")
    return {f"final/{name}": value for name, value in score.metrics.items()}
