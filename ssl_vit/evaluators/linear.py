"""Linear probe on frozen, cached features: many learning rates side by side, chosen honestly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.data.order import permute
from ssl_vit.schedules import warmup_cosine
from ssl_vit.seeds import fold

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class LinearProtocol:
    """The head of MAE's linear probe (He et al. 2022, appendix A.1) on cached features.

    BatchNorm without affine parameters (eps 1e-6), one linear layer (weights normal with
    sigma .01), SGD with momentum .9 and no weight decay, linear warm-up, cosine to 0. Features are
    cached once, so there is no augmentation; SGD stands for LARS, whose trust ratio only matters
    at MAE's batch of 16384.
    """

    epochs: int = 90
    warmup_share: float = 1 / 9
    batch_size: int = 1024
    momentum: float = 0.9
    learning_rates: tuple[float, ...] = LEARNING_RATES
    held_out: float = 0.1
    seed: int = 0


@dataclass
class LinearResult:
    """Predictions (q, top) best first, the chosen rate, and each rate's held-out accuracy."""

    predicted: Int64[Tensor, "q top"]
    chosen: float
    held_out_accuracy: dict[float, float]


class Heads(nn.Module):
    """One BatchNorm and ``g`` linear layers over the same features."""

    def __init__(self, heads: int, width: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        weight = torch.randn(width, classes, generator=generator) * 0.01
        self.weight = nn.Parameter(weight[:, None].repeat(1, heads, 1))
        self.bias = nn.Parameter(torch.zeros(heads, classes))

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b g c"]:
        """Logits of every head, in one matrix product."""
        logits = self.norm(features) @ self.weight.flatten(1)
        return logits.unflatten(1, self.bias.shape) + self.bias


def fit_heads(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    classes: int,
    rates: tuple[float, ...],
    protocol: LinearProtocol,
) -> Heads:
    """Train one head for each learning rate (for 256 images), all on the same batches."""
    generator = torch.Generator().manual_seed(fold(protocol.seed))
    heads = Heads(len(rates), features.shape[1], classes, generator).to(features.device)
    heads.train()
    # Small sets would give a handful of steps; at least 8 batches an epoch.
    size = max(2, min(protocol.batch_size, len(features) // 8))
    steps = len(features) // size
    rate = torch.tensor(rates, device=features.device).view(-1, 1)
    speed = {p: torch.zeros_like(p) for p in heads.parameters()}
    total = protocol.epochs * steps
    warmup = round(protocol.warmup_share * total)
    for step in range(total):
        within = step % steps
        if within == 0:
            order = torch.randperm(len(features), generator=generator).to(features.device)
        pick = order[within * size : (within + 1) * size]
        logits = heads(features[pick])
        target = labels[pick, None].expand(-1, len(rates))
        # The sum over heads: each head's gradient is that of its own mean loss.
        loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="sum") / size
        gradients = torch.autograd.grad(loss, list(speed))
        lr = rate * warmup_cosine(step, warmup=warmup, total=total, peak=size / 256)
        with torch.no_grad():
            for (parameter, velocity), gradient in zip(speed.items(), gradients, strict=True):
                velocity.mul_(protocol.momentum).add_(gradient)
                parameter.sub_(lr * velocity)
    # Frozen features have fixed statistics: the exact ones, not a running estimate of them.
    heads.norm.running_mean, heads.norm.running_var = features.mean(0), features.var(0)
    return heads.eval()


def linear_probe(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    queries: Float[Tensor, "q d"],
    protocol: LinearProtocol | None = None,
) -> LinearResult:
    """Fit on the training features, choose the rate on a held-out tenth of them, predict queries.

    Of equal rates the lowest is chosen, and trained again on all training features. Query labels
    are never seen.
    """
    protocol = protocol or LinearProtocol()
    classes = int(labels.max()) + 1
    order = permute(np.arange(len(labels), dtype=np.int64), len(labels), fold(protocol.seed, 1))
    shuffled = torch.from_numpy(order).to(labels.device)
    n_held = max(1, round(protocol.held_out * len(labels)))
    held, kept = shuffled[:n_held], shuffled[n_held:]
    rates = protocol.learning_rates
    trial = fit_heads(features[kept], labels[kept], classes, rates, protocol)
    with torch.no_grad():
        guesses = trial(features[held]).argmax(-1)
    scores = (guesses == labels[held, None]).double().mean(0).tolist()
    chosen = rates[scores.index(max(scores))]
    final = fit_heads(features, labels, classes, (chosen,), protocol)
    with torch.no_grad():
        logits = final(queries)[:, 0]
    by_rate = {r: 100.0 * s for r, s in zip(rates, scores, strict=True)}
    return LinearResult(logits.topk(min(5, classes), dim=1).indices, chosen, by_rate)
