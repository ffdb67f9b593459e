"""Matmul peak: the rate at which a device multiplies matrices of the shapes of a training step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.benchmarks.speed import wait

_SECONDS = 0.05  # timing of one shape
_MOST = 12  # number of shapes, those with the largest shares of the step's FLOPs
_FIRST = {"mm": 0, "bmm": 0, "addmm": 1, "_addmm_activation": 1, "baddbmm": 1}

Shape = tuple[int, int, int, int]
"""Matmul shape (b, m, k, n): b products of (m, k) by (k, n)."""


class MatmulShapes(TorchDispatchMode):
    """Matmul shapes: a context that records all matrix products, forward and backward.

    ``shapes``: number of products of each shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[Shape] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name in _FIRST:
            left, right = args[_FIRST[name]].shape, args[_FIRST[name] + 1].shape
            b = left[0] if len(left) == 3 else 1
            self.shapes[b, left[-2], left[-1], right[-1]] += 1
        return func(*args, **(kwargs or {}))


def flops(shape: Shape) -> int:
    """FLOPs of one product; a multiplication and an addition are two."""
    b, m, k, n = shape
    return 2 * b * m * k * n


def matmul_peak(
    shapes: Counter[Shape], device: torch.device, precision: torch.dtype
) -> dict[str, Any]:
    """Matmul peak: the best rate of the step's own linear layers and that of each shape, in FLOP/s.

    Not the rate of a square product: libraries are far slower at some shapes than at others, and a
    model's shapes are not square. The shapes with the largest shares, without batched products
    (attention), are each timed as the forward pass of a linear layer: (m, k) by the transpose of
    (n, k).
    """
    counted = {s: flops(s) * n for s, n in shapes.items()}
    linear = sorted((s for s in counted if s[0] == 1), key=lambda s: -counted[s])[:_MOST]
    if not linear:
        return {"flops_per_second": None, "shape": None, "share_of_products": 0.0, "rates": []}
    rates = [_rate(s, device, precision) for s in linear]
    best = max(range(len(rates)), key=lambda i: rates[i])
    return {
        "flops_per_second": rates[best],
        "shape": list(linear[best][1:]),
        "share_of_products": sum(counted[s] for s in linear) / sum(counted.values()),
        "rates": [[*s[1:], r] for s, r in zip(linear, rates, strict=True)],
    }


def better(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Higher of two measured peaks; disturbances can only lower a measurement."""
    return max(first, second, key=lambda peak: peak["flops_per_second"] or 0.0)


def _rate(shape: Shape, device: torch.device, precision: torch.dtype) -> float:
    _, m, k, n = shape
    left = torch.randn(m, k, device=device).to(precision)
    right = torch.randn(n, k, device=device).to(precision).t()
    out = torch.empty(m, n, device=device, dtype=precision)

    def multiply() -> object:
        return torch.mm(left, right, out=out)

    _seconds(multiply, 1, device)
    once = min(_seconds(multiply, 1, device) for _ in range(2))
    calls = max(1, min(1000, round(_SECONDS / once)))
    return flops(shape) * calls / _seconds(multiply, calls, device)


def _seconds(call: Callable[[], object], times: int, device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        call()
    wait(device)
    return max(time.perf_counter() - started, 1e-9)
