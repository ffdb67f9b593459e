"""Linear probe on cached features: a grid of heads trained together, selected on held-out data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isnan
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssl_vit.common.checks import check_below_one, check_given, check_least, check_positive
from ssl_vit.common.errors import check
from ssl_vit.common.schedules import warmup_cosine
from ssl_vit.common.seeds import fold
from ssl_vit.common.transfer import without_wait
from ssl_vit.data.order import Order
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.linear_heads import (
    FeatureNorm,
    HeadOptimizer,
    LinearHeads,
    heads_of,
    preconditioner,
)
from ssl_vit.evaluators.options import FEATURES, parts_of
from ssl_vit.evaluators.scores import Prediction
from ssl_vit.evaluators.selection import (
    NOT_CHOSEN,
    best,
    grid_of,
    guesses_of,
    outputs_of,
    quality,
    split_rows,
    usable,
)

Parts = dict[str, Tensor]
_LEAST_BATCH = 32
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class LinearProtocol:
    """Linear probe protocol ``fast``: heads trained on features cached once, unaugmented.

    A grid of learning rates x features, as DINOv2's (Oquab et al. 2023, appendix B.3), but selected
    on images held out from training. Each head is that of MAE's probe (He et al. 2022, appendix
    A.1): features standardised, by the exact statistics of all training ones, and one linear layer
    of normal weights (sigma .01), here by SGD without weight decay, its gradients preconditioned by
    the features' covariance to the power of minus ``whitening`` (0: plain SGD).

    Small sets get ``least_steps`` updates, in more epochs.

    ``learning_rates`` are for 256 images; of ``features`` those that the encoder has are tried;
    ``fallback_rate`` is used, with the first feature, where too few images remain to select on.
    """

    prefix: ClassVar[None] = None
    name: ClassVar[str] = "fast"
    epochs: int = 10
    least_steps: int = 1000
    batch_size: int = 512
    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    features: tuple[str, ...] = ("cls", "cls+mean", "cls4", "cls4+mean")
    fallback_rate: float = 0.01
    warmup_share: float = 0.1
    momentum: float = 0.9
    whitening: float = 0.5
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, 1, "epochs", "batch_size")
        check_below_one(self, "held_out")
        check_given(self, "learning_rates")
        check_positive(self, "learning_rates")

    def batch(self, n: int) -> int:
        """Batch size: an eighth of small sets, all of tiny ones."""
        return min(n, self.batch_size, max(_LEAST_BATCH, n // 8))

    def steps(self, n: int) -> int:
        """Number of updates, with ``n`` images."""
        return max(self.least_steps, self.epochs * (n // self.batch(n)))


def joined(parts: Parts, names: tuple[str, ...]) -> Parts:
    """Features (keys of ``FEATURES``) concatenated from their parts."""
    return {name: torch.cat([parts[p] for p in FEATURES[name]], dim=1) for name in names}


def fit_linear_heads(
    train: FeatureSet,
    points: list[tuple[str, float]],
    protocol: LinearProtocol,
    device: torch.device = _CPU,
) -> dict[str, LinearHeads]:
    """Fit a head for each (feature, learning rate), all on the same batches; stacked by feature.

    On ``device``, to which the rows of a batch are moved: features of many images do not fit there.
    """
    targets, n = train.labels.to(device), len(train.labels)
    parts = {name: [train.parts[p] for p in FEATURES[name]] for name, _ in points}
    # Frozen features have fixed statistics: the exact ones, not a running estimate.
    norms = {name: FeatureNorm.of(*found).to(device) for name, found in parts.items()}
    widths = {name: len(norm.mean) for name, norm in norms.items()}
    heads = heads_of(points, widths, outputs_of(train.labels), protocol.seed, norms.__getitem__)
    for stack in heads.values():
        stack.to(device).eval()
    flat = {n: preconditioner(parts[n], norms[n], protocol.whitening) for n in heads}
    optimizer = HeadOptimizer(heads, protocol.momentum, precondition=flat)
    names, size, total = tuple(heads), protocol.batch(n), protocol.steps(n)
    order = Order(n, size, fold(protocol.seed, 2))
    warmup = round(protocol.warmup_share * total)
    for step in range(total):
        rows = torch.from_numpy(order.part(step, 0)[1])
        seen = {p: without_wait(train.parts[p][rows], device) for p in parts_of(names)}
        factor = warmup_cosine(step, warmup=warmup, total=total, peak=size / 256)
        optimizer.step(joined(seen, names), targets[without_wait(rows, device)], factor)
    return heads


def linear_probe(
    train: FeatureSet,
    val: FeatureSet,
    protocol: LinearProtocol | None = None,
    held_out: FeatureSet | None = None,
    device: torch.device = _CPU,
) -> list[Prediction]:
    """Linear probe: predict ``val`` with the head selected from the grid, without its labels.

    The head is selected on ``held_out``, or on a seeded share of the training images, stratified by
    class, or of their groups; it is then retrained on all of them. Of equal heads, the one with the
    narrowest feature, then the lowest learning rate is selected. Where too few images remain, the
    fallback is used, and the details record it. All sets are on the CPU; heads are trained on
    ``device``.

    Raises:
        UserError: fewer than two images, or none of the features.
    """
    protocol = protocol or LinearProtocol()
    check(len(train.labels) >= 2, "a linear probe needs at least 2 training images")
    names = usable(protocol.features, train.has)
    widths = {n: sum(train.parts[p].shape[1] for p in FEATURES[n]) for n in names}
    grid = grid_of(widths, protocol.learning_rates)
    found = score_grid(train, grid, protocol, held_out, device)
    chosen = best(found)
    point = chosen or (grid[0][0], protocol.fallback_rate)
    heads = fit_linear_heads(train, [point], protocol, device)
    n = len(train.labels)
    resolved = {"batch_size": protocol.batch(n), "steps": protocol.steps(n)}
    details = protocol_details(
        protocol, found, resolved | ({} if chosen else {"selection": NOT_CHOSEN})
    )
    logits = heads[point[0]].logits(val.feature(point[0]).to(device), point[1])
    guesses = guesses_of(logits, train.labels).cpu()
    return [Prediction(point[0], f"lr={point[1]:g}", guesses, details)]


def score_grid(
    train: FeatureSet,
    grid: list[tuple[str, float]],
    protocol: LinearProtocol,
    held_out: FeatureSet | None,
    device: torch.device,
) -> dict[tuple[str, float], float]:
    """Quality of each grid point on held-out images; empty if there are too few."""
    if held_out is None:
        rows = split_rows(train.labels, protocol.held_out, protocol.seed, train.groups)
        if rows is None:
            return {}
        train, held_out = train.take(rows[0]), train.take(rows[1])
    return grid_quality(fit_linear_heads(train, grid, protocol, device), held_out)


def grid_quality(
    heads: dict[str, LinearHeads], held_out: FeatureSet
) -> dict[tuple[str, float], float]:
    """Quality of each trained head on a set, in the heads' order."""
    found = {}
    for name, stack in heads.items():
        device = stack.weight.device
        features, labels = held_out.feature(name).to(device), held_out.labels.to(device)
        for rate in stack.rates:
            found[name, rate] = quality(stack.logits(features, rate), labels)
    return found


def protocol_details(
    protocol: Any, found: dict[tuple[str, float], float], resolved: dict[str, Any]
) -> dict[str, Any]:
    """Protocol details recorded with a score, as JSON; ``resolved`` replaces options."""
    grid: dict[str, dict[str, float | None]] = {}
    for (name, setting), value in found.items():
        grid.setdefault(name, {})[f"{setting:g}"] = None if isnan(value) else round(value, 3)
    details = {"protocol": protocol.name, **asdict(protocol), "held_out_quality": grid}
    return details | resolved
