"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the weight matrices of
transformer blocks, with AdamW for all other parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ssl_vit.common.distributed import local, own_rows, sharded_like, whole

MUONS_MOMENT = "momentum_buffer"
"""Name of what Muon keeps of a matrix, where AdamW keeps two moments."""

_MOMENTUM = 0.95
# The quintic of which five iterations bring singular values from 0.003 to 1 close to 1.
_QUINTIC, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# Updates have about this root mean square, as AdamW's have: Muon takes its learning rate and weight
# decay (Liu et al. 2025, arXiv 2502.16982).
_RMS = 0.2
_AT_ONCE = 2**24  # numbers in matrices that are orthogonalized together


def block_matrices(module: nn.Module) -> set[nn.Parameter]:
    """Weight matrices within transformer blocks: those that Muon trains."""
    blocks = [m for m in module.modules() if isinstance(m, Block | EvaBlock)]
    return {p for block in blocks for p in block.parameters() if p.ndim == 2}


def orthogonalizing(matrices: Iterable[Tensor]) -> int:
    """FLOPs of orthogonalizing these matrices once, of any batch."""
    small, large = 0, 0
    for matrix in matrices:
        side = min(matrix.shape)
        small += side**3
        large += side * matrix.numel()
    return 2 * _ITERATIONS * (small + 2 * large)


def by_muon(optimizer: Optimizer) -> set[nn.Parameter]:
    """The parameters that an optimizer trains by Muon."""
    groups = (group for group in optimizer.param_groups if group.get("muon"))
    return {parameter for group in groups for parameter in group["params"]}


class Muon(AdamW):
    """AdamW, but for the groups that have ``muon`` set: these move by their momentum, brought close
    to the nearest orthogonal matrix.

    It has the flag ``found_inf`` of fused AdamW, read on the device: where it is not 0, nothing
    changes. Of sharded matrices each process keeps its rows, and orthogonalizes the whole ones.

    Args:
        groups: as for AdamW, each with ``muon``, a bool.
        half: orthogonalize in bfloat16, else in the precision of the weights.
        options: of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], half: bool, **options: Any) -> None:
        super().__init__(groups, **options)
        self.half = half

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all groups."""
        groups = self.param_groups
        try:
            self.param_groups = [g for g in groups if not g["muon"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step(group)

    def _step(self, group: dict[str, Any]) -> None:
        device = group["params"][0].device
        takes = getattr(self, "found_inf", torch.zeros((), device=device)) == 0
        rate = takes * group["lr"]
        for several in _alike(group["params"]):
            directions = [self._direction(parameter, takes) for parameter in several]
            moves = orthogonalized(torch.stack(directions).to(self._kind(several[0])))
            size = _RMS * max(several[0].shape) ** 0.5
            for parameter, move in zip(several, moves, strict=True):
                own = local(parameter)
                own.mul_(1 - rate * group["weight_decay"])
                own.addcmul_(move[own_rows(parameter)].to(own.dtype), -size * rate)

    def _kind(self, parameter: Tensor) -> torch.dtype:
        return torch.bfloat16 if self.half else parameter.dtype

    def _direction(self, parameter: nn.Parameter, takes: Tensor) -> Tensor:
        """Nesterov's momentum of a whole matrix, which takes in the gradient."""
        state = self.state[parameter]
        if not state:
            state[MUONS_MOMENT] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        gradient, momentum = local(parameter.grad), local(state[MUONS_MOMENT])
        gradient = gradient.where(takes, 0)  # not a number times 0 is none
        momentum.lerp_(gradient, ((1 - _MOMENTUM) * takes).to(momentum.dtype))
        return whole(sharded_like(parameter, gradient.lerp(momentum, _MOMENTUM)))


def _alike(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of equal shapes that have gradients, some at a time."""
    shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            shapes[parameter.shape].append(parameter)
    for shape, same in shapes.items():
        count = max(1, _AT_ONCE // shape.numel())
        yield from (same[i : i + count] for i in range(0, len(same), count))


def orthogonalized(matrices: Float[Tensor, "n rows columns"]) -> Float[Tensor, "n rows columns"]:
    """About U V^T of each matrix U S V^T: singular values come to lie between 0.6 and 1.25, if they
    were more than 0.003 of the matrix's norm.

    By Newton and Schulz' iteration with a quintic, on the smaller side of the matrices.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    first, third, fifth = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        x = torch.baddbmm(x, gram, x, beta=first)
    return x.mT if tall else x
