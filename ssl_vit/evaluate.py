"""The evaluation door: ``python -m ssl_vit.evaluate knn|linear --encoder RUN_OR_FILE ...``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ssl_vit.cli import find_recipe, layered, run_door, show_table, split_config, subcommand
from ssl_vit.config import check
from ssl_vit.data.sources import check_classes, open_source
from ssl_vit.encoder import Encoder, image_size
from ssl_vit.evaluators.features import (
    Embed,
    FeatureSet,
    View,
    extract,
    open_encoder,
    pixels,
    pooled,
    ready,
)
from ssl_vit.evaluators.linear import LinearProtocol
from ssl_vit.evaluators.protocol import protocol_card, split_card, write_card
from ssl_vit.evaluators.scores import KS, Score, knn_scores, linear_scores
from ssl_vit.training.metrics import duration
from ssl_vit.training.parallel import resolve_device, resolve_precision
from ssl_vit.weights.exchange import EncoderInfo, encoder_path, read_info, sha256

log = logging.getLogger("ssl_vit")
_PROG = "python -m ssl_vit.evaluate"


@dataclass(frozen=True)
class EvalData:
    """Labelled images to learn from, and to be judged on."""

    train: str = ""
    """Labelled images, named as for pretraining: folder:PATH, tar:..., torchvision:..., hf:..."""
    val: str = ""
    """Labelled images that the score is measured on; nothing is chosen by them."""
    workers: int = -1
    """Loader processes. -1: one for each core (on the CPU, for every second one), at most 16."""


@dataclass(frozen=True)
class EvalConfig:
    """What every evaluator needs."""

    config: str = ""
    """A YAML file of these options. The command line wins."""
    data: EvalData = field(default_factory=EvalData)
    encoder: str = ""
    """A run folder or an encoder file. random:RUN_OR_FILE: the same architecture with random
    weights. pixels:RUN_OR_FILE: no encoder, the images that it would see, at most 32 x 32."""
    out: str = ""
    """JSON file for the scores and their protocol. Empty: <evaluator>.json in the run folder."""
    seed: int = 0
    """For the random encoder, the probe's weights, batches and held-out split."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16, fp32 or auto, as in pretraining. Features are kept, and heads trained, in fp32."""
    batch_size: int = 256
    """Images that go through the encoder at once."""


@dataclass(frozen=True)
class KnnConfig(EvalConfig):
    """Weighted k-nearest neighbours by cosine similarity."""

    k: tuple[int, ...] = KS
    """Numbers of neighbours; those above the number of training images are left out."""

    def __post_init__(self) -> None:
        check(bool(self.k) and min(self.k) >= 1, f"--k is {self.k}; numbers of at least 1")


@dataclass(frozen=True)
class LinearConfig(EvalConfig):
    """Linear probe on frozen features; its learning rate is chosen without --data.val."""

    epochs: int = 90
    """Passes over the training features."""

    def __post_init__(self) -> None:
        check(self.epochs >= 1, f"--epochs is {self.epochs}; at least 1")


_EVALUATORS: dict[str, type[EvalConfig]] = {"knn": KnnConfig, "linear": LinearConfig}


def resolve_encoder(name: str, seed: int) -> tuple[Embed, Encoder | None, EncoderInfo, Path]:
    """An ``--encoder`` argument as features: what to call, its module, its info, its file.

    Raises:
        UserError: no such file, or not an encoder.
    """
    kind, _, rest = name.partition(":")
    if kind == "pixels" and rest:
        path = encoder_path(rest)
        return pixels, None, read_info(path), path
    encoder, info, path = open_encoder(name, seed)
    return pooled(encoder), encoder, info, path


def evaluate(
    config: EvalConfig, evaluator: str, score: Callable[[FeatureSet, FeatureSet], list[Score]]
) -> tuple[list[Score], dict[str, Any], Path]:
    """Features of both sets, their scores, and the protocol; with the path to write it to."""
    embed, encoder, info, path = resolve_encoder(config.encoder, config.seed)
    train, val = open_source(config.data.train), open_source(config.data.val)
    for option, source in (("train", train), ("val", val)):
        check(source.labels is not None, f"--data.{option} {source.spec} has no labels")
    check_classes(train, val)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    if encoder is not None:
        ready(encoder, device)
    view = View(image_size(info.config), info.channels, info.mean, info.std)
    started = time.perf_counter()
    workers, size = config.data.workers, config.batch_size
    sets = [extract(embed, s, view, device, precision, workers, size) for s in (train, val)]
    scores = score(*(s.to(device) for s in sets))
    card = protocol_card(
        evaluator,
        {"given": config.encoder, "file": str(path), "sha256": sha256(path), **asdict(info)},
        view,
        {"train": split_card(train, sets[0]), "val": split_card(val, sets[1])},
        options=asdict(config),
        device=str(device),
        precision=str(precision).removeprefix("torch."),
        seconds=round(time.perf_counter() - started, 1),
    )
    kind = config.encoder.partition(":")[0]
    prefix = f"{kind}-" if kind in ("random", "pixels") else ""
    out = Path(config.out) if config.out else path.parent / f"{prefix}{evaluator}.json"
    return scores, card, out


def main(argv: list[str]) -> int:
    """The door; returns the exit status."""
    started = time.perf_counter()
    name = subcommand(argv, _PROG, "evaluator", list(_EVALUATORS))
    configs, flags = split_config(argv[1:])
    kind = _EVALUATORS[name]
    files = [find_recipe(c) for c in configs]
    config = layered(kind(), files, flags, f"{_PROG} {name}", kind.__doc__ or "", kind)
    for option, value in (("encoder", config.encoder), ("data.train", config.data.train)):
        check(bool(value), f"--{option} is missing")
    check(bool(config.data.val), "--data.val is missing")
    check(config.batch_size >= 1, f"--batch-size is {config.batch_size}; at least 1")
    torch.manual_seed(config.seed)
    if isinstance(config, KnnConfig):
        ks = config.k
        scores, card, out = evaluate(config, name, lambda t, v: knn_scores(t, v, ks))
    else:
        assert isinstance(config, LinearConfig)
        protocol = LinearProtocol(epochs=config.epochs, seed=config.seed)
        scores, card, out = evaluate(config, name, lambda t, v: linear_scores(t, v, protocol))
        card["probe"] = asdict(protocol)
    rows = [(s.features, s.setting, f"{s.top1:.2f}", f"{s.top5:.2f}") for s in scores]
    n, m = card["val"]["images"], card["train"]["images"]
    title = f"{name}: {config.encoder}, {n:,} images judged, {m:,} to learn from, accuracy in %"
    show_table(title, rows, header=("features", "setting", "top-1", "top-5"))
    write_card(out, card, scores)
    print(f"protocol and scores: {out}")
    log.info("done in %s", duration(time.perf_counter() - started))
    return 0


if __name__ == "__main__":
    run_door(main)
