"""Attentive probe: a grid of attentive heads trained together, selected on held-out images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.common.schedules import warmup_cosine
from ssl_vit.common.seeds import fold
from ssl_vit.data.order import Order
from ssl_vit.data.sources import Source
from ssl_vit.evaluators.attentive_head import AttentiveHead, alike, heads_for
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.linear_heads import linear_heads_loss
from ssl_vit.evaluators.scores import Prediction
from ssl_vit.evaluators.selection import NOT_CHOSEN, guesses_of, outputs_of, quality, split_rows
from ssl_vit.evaluators.token_sets import TokenSet, answers

log = logging.getLogger("ssl_vit")
_LEAST_BATCH = 32
_CELLS = 1 << 26


@dataclass(frozen=True)
class AttentiveProtocol:
    """Attentive probe protocol: cross-attention of learnt queries to the patch tokens, as CAPI's
    (Darcet et al. 2025): heads of 64 channels, no MLP, AdamW and a grid of learning rates.

    Tokens are standardised by the exact statistics of all training ones (AIM, El-Nouby et al. 2024,
    has a BatchNorm there). [CLS] and registers are not attended to, so that encoders with and
    without them are judged alike. Images are not augmented: tokens are computed once. With
    ``depth`` above 1, self-attention blocks come before, as in V-JEPA 2 (Assran et al. 2025).

    Small sets get ``least_steps`` updates, in more epochs. ``fallback_rate`` is used where too few
    images remain to select on. ``heads`` 0: as many as are 64 channels wide, or one.
    """

    name: ClassVar[str] = "attentive"
    heads: int = 0
    depth: int = 1
    queries: Literal["one", "class"] = "one"
    epochs: int = 10
    least_steps: int = 1000
    batch_size: int = 256
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    fallback_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.1
    held_out: float = 0.1
    seed: int = 0

    def batch(self, n: int) -> int:
        """Batch size: an eighth of small sets, all of tiny ones."""
        return min(n, self.batch_size, max(_LEAST_BATCH, n // 8))

    def steps(self, n: int) -> int:
        """Number of updates, with ``n`` images."""
        return max(self.least_steps, self.epochs * (n // self.batch(n)))

    def head_count(self, width: int) -> int:
        """Attention heads for tokens of ``width`` channels.

        Raises:
            UserError: ``heads`` does not divide the width.
        """
        heads = self.heads or heads_for(width)
        check(width % heads == 0, f"--heads is {heads}; it must divide the tokens' width, {width}")
        return heads

    def head(self, width: int, outputs: int) -> AttentiveHead:
        """Head of this protocol for tokens of ``width`` channels."""
        heads, each = self.head_count(width), self.queries == "class"
        return AttentiveHead(width, outputs, heads, self.depth, each, fold(self.seed, 1))


def fit_attentive_heads(
    tokens: TokenSet,
    rows: Int64[Tensor, " n"],
    rates: Sequence[float],
    protocol: AttentiveProtocol,
) -> dict[float, AttentiveHead]:
    """Fit a head for each learning rate, all on the same batches of the images ``rows``.

    AdamW; linear warm-up over a tenth, then half a cosine to 0. Each head is as if trained alone.
    """
    device, n = tokens.mean.device, len(rows)
    made = protocol.head(tokens.reader.width, outputs_of(tokens.rows.labels)).to(device)
    heads = alike(made, rates)
    optimizer = torch.optim.AdamW(
        [{"params": list(head.parameters()), "lr": 0.0} for head in heads.values()],
        weight_decay=protocol.weight_decay,
    )
    size, total = protocol.batch(n), protocol.steps(n)
    part = max(1, _CELLS // (len(heads) * made.cells(tokens.places)))
    for step, (batch, seen) in enumerate(_epochs(tokens, rows, size, total, protocol.seed)):
        if step % max(1, total // 5) == 0:
            log.info("attentive probe: step %d of %d", step, total)
        factor = warmup_cosine(
            step, warmup=round(protocol.warmup_share * total), total=total, peak=1.0
        )
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad()
        targets = tokens.rows.labels[seen].to(device)
        for some, truth in zip(batch.split(part), targets.split(part), strict=True):
            logits = torch.stack([head(some) for head in heads.values()], dim=1)
            (linear_heads_loss(logits, truth) * (len(some) / len(batch))).backward()
        optimizer.step()
    return {rate: head.eval() for rate, head in heads.items()}


def _epochs(
    tokens: TokenSet, rows: Int64[Tensor, " n"], size: int, total: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of ``total`` steps: tokens, and their rows; each epoch in another order, without its
    incomplete last batch."""
    order = Order(len(rows), size, fold(seed, 2))
    for start in range(0, total, order.steps_per_epoch):
        steps = min(order.steps_per_epoch, total - start)
        places = np.arange(steps * size, dtype=np.int64)
        some = rows[torch.from_numpy(order.at(start // order.steps_per_epoch, places))]
        yield from tokens.batches(some, size)


@torch.no_grad()
def grid_quality(
    heads: dict[float, AttentiveHead], tokens: TokenSet, rows: Int64[Tensor, " n"]
) -> dict[float, float]:
    """Quality in percent of each head on these images, in the heads' order."""
    size = tokens.reader.machine.at_once
    found: dict[float, list[Tensor]] = {rate: [] for rate in heads}
    for batch, _ in tokens.batches(rows, size):
        for rate, head in heads.items():
            found[rate].append(head(batch).cpu())
    labels = tokens.rows.labels[rows]
    return {rate: quality(torch.cat(logits), labels) for rate, logits in found.items()}


def choose_rate(
    tokens: TokenSet, protocol: AttentiveProtocol, held_out: TokenSet | None
) -> tuple[float | None, dict[float, float]]:
    """Learning rate selected on ``held_out``, or on a seeded share of the training images,
    stratified by class, or of their groups; the lowest of equal ones. And each one's quality.

    None where too few images remain to select on.
    """
    kept = torch.arange(len(tokens.rows.labels))
    if held_out is None:
        labels, groups = tokens.rows.labels, tokens.rows.groups
        rows = split_rows(labels, protocol.held_out, protocol.seed, groups)
        if rows is None:
            return None, {}
        kept, judged, on = *rows, tokens
    else:
        judged, on = torch.arange(len(held_out.rows.labels)), held_out
    heads = fit_attentive_heads(tokens, kept, sorted(protocol.learning_rates), protocol)
    found = grid_quality(heads, on, judged)
    scored = {rate: value for rate, value in found.items() if not isnan(value)}
    return max(scored, key=scored.__getitem__, default=None), found


def attentive_probe(
    tokens: TokenSet,
    val: Source,
    protocol: AttentiveProtocol,
    held_out: TokenSet | None = None,
) -> tuple[Prediction, FeatureSet, AttentiveHead]:
    """Attentive probe: predict ``val`` with the head selected from the grid, without its labels.

    The selected head is retrained on all training images. Returns the prediction, the readable
    images of ``val`` with their labels, and the head. ``held_out`` must be standardised as
    ``tokens`` is.

    Raises:
        UserError: fewer than two images, or heads that do not divide the width.
    """
    n = len(tokens.rows.labels)
    check(n >= 2, "an attentive probe needs at least 2 training images")
    chosen, found = choose_rate(tokens, protocol, held_out)
    rate = protocol.fallback_rate if chosen is None else chosen
    head = fit_attentive_heads(tokens, torch.arange(n), [rate], protocol)[rate]

    @torch.no_grad()
    def read(some: Tensor) -> Tensor:
        return guesses_of(head(tokens.standard(some)), tokens.rows.labels)

    guesses, rows = answers(tokens.reader, val, read)
    asked = "a query a class" if protocol.queries == "class" else "one query"
    heads = f"{head.heads} head" + ("s" if head.heads > 1 else "")
    setting = f"{asked}, {heads}, lr={rate:g}"
    details = _details(protocol, found, tokens, head)
    details |= {} if chosen is not None else {"selection": NOT_CHOSEN}
    return Prediction("patches", setting, guesses, details), rows, head


def _details(
    protocol: AttentiveProtocol, found: dict[float, float], tokens: TokenSet, head: AttentiveHead
) -> dict[str, Any]:
    n = len(tokens.rows.labels)
    by_rate = {f"{r:g}": None if isnan(q) else round(q, 3) for r, q in found.items()}
    return {"protocol": protocol.name, **asdict(protocol)} | {
        "heads": head.heads,
        "batch_size": protocol.batch(n),
        "steps": protocol.steps(n),
        "attends": "patch tokens after the final norm; not [CLS], not registers",
        "tokens": tokens.places,
        "tokens_kept": tokens.kept is not None,
        "held_out_quality": by_rate,
    }
