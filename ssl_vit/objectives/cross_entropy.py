"""Cross-entropy between outputs of a teacher and of a student: of views, of masked patches."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_vit.objectives.row_blocks import row_blocks


def cross_entropy_of_views(
    target: Float[Tensor, "g b k"],
    student: Float[Tensor, "v b k"],
    temperature: float = 1.0,
    local_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of every pair of different views (Caron et al. 2021); the student's first g are
    the teacher's.

    ``target`` holds probabilities, which get no gradient; ``student`` logits, before they are
    divided by their temperature. It equals::

        logits = student / temperature
        pairs = [(t, s) for t in range(g) for s in range(v) if s != t]
        weight = lambda s: 1 if s < g else local_weight
        mean(
            weight(s) * -(target[t] * logits[s].log_softmax(-1)).sum(-1).mean() for t, s in pairs
        )

    but visits each view once, and finds its gradient at the same time.
    """
    with torch.autocast(student.device.type, enabled=False):  # it would round a product
        loss: Tensor = _CrossEntropy.apply(target, student, temperature, local_weight)
    return loss


def cross_entropy_of_rows(
    target: Float[Tensor, "n k"],
    student: Float[Tensor, "n k"],
    weights: Float[Tensor, " n"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Weighted sum of the cross-entropies of rows, as of masked patches.

    ``target`` holds probabilities, without gradient (rows of weight 0 may hold anything finite);
    ``student`` logits. It equals ``-(weights[:, None] * target * logp).sum()``, with logp the
    log-softmax of ``student / temperature``, and finds its gradient at the same time.
    """
    with torch.autocast(student.device.type, enabled=False):
        loss: Tensor = _CrossEntropyOfRows.apply(target, student, weights, temperature)
    return loss


class _CrossEntropyOfRows(torch.autograd.Function):
    """The gradient by the logits is w (m p - t) / temperature, with m the target's mass."""

    @staticmethod
    def forward(
        ctx: Any,
        target: Float[Tensor, "n k"],
        student: Float[Tensor, "n k"],
        weights: Float[Tensor, " n"],
        temperature: float,
    ) -> Float[Tensor, ""]:
        grad, each = torch.empty_like(student), torch.empty_like(weights)
        for block in row_blocks(student):
            own = target[block]
            log_p = (student[block] * (1 / temperature)).log_softmax(-1)
            each[block] = -(own * log_p).sum(-1)
            apart = log_p.exp_().mul_(own.sum(-1, keepdim=True)).sub_(own)
            grad[block] = apart.mul_(weights[block, None] / temperature)
        ctx.save_for_backward(grad)
        return (each * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[None, Tensor, None, None]:
        return None, ctx.saved_tensors[0] * grad, None, None


class _CrossEntropy(torch.autograd.Function):
    """A view s is compared with w_s, the sum of all targets but its own, of total mass m_s: the
    loss is the sum of -w_s log p_s over all, and its gradient by the logits m_s p_s - w_s."""

    @staticmethod
    def forward(
        ctx: Any,
        target: Float[Tensor, "g b k"],
        student: Float[Tensor, "v b k"],
        temperature: float,
        local_weight: float,
    ) -> Float[Tensor, ""]:
        g, v, batch = len(target), len(student), target.shape[1]
        share = 1 / (batch * (g * v - g))
        together = target.sum(0)
        log_p = (student * (1 / temperature)).log_softmax(-1)
        own = (target * log_p[:g]).sum()
        others = log_p.flatten(1) @ together.flatten()
        loss = (own - others[:g].sum() - local_weight * others[g:].sum()) * share
        mass = log_p.new_full((v, 1, 1), g * local_weight)
        mass[:g] = g - 1
        grad = log_p.exp_().mul_(mass * (share / temperature))
        grad[:g].sub_(together, alpha=share / temperature)
        grad[g:].sub_(together, alpha=local_weight * share / temperature)
        grad[:g].add_(target, alpha=share / temperature)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[None, Tensor, None, None]:
        return None, ctx.saved_tensors[0] * grad, None, None
