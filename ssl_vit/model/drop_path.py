"""Stochastic depth whose decisions are those of the whole batch, however the batch is split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from timm import layers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_vit.common.seeds import fold
from ssl_vit.common.transfer import without_wait

# oneDNN makes kernels for each number of rows, some twenty for a block, and keeps them: on a CPU
# with AMX in 3 ms and half a MB each. Memory, too, is cut anew for each. So there are few numbers.
_NUMBERS = 4


class _Share(NamedTuple):
    """Part of a batch at hand, and how many times its decisions have been drawn from."""

    part: int
    parts: int
    images: int
    key: int
    drawn: int = 0


# Backward runs in threads of its own on GPUs: there it is unset, but for what `redraw` restores.
_current: ContextVar[_Share | None] = ContextVar("share", default=None)


class _Within:
    """Context in which a share is the one at hand; it can be entered again and again."""

    def __init__(self, share: _Share | None) -> None:
        self.share = share

    def __enter__(self) -> None:
        self.before = _current.set(self.share)

    def __exit__(self, *error: object) -> None:
        _current.reset(self.before)


def batch_share(part: int, parts: int, images: int, key: int) -> AbstractContextManager[None]:
    """Context in which the ``images`` at hand are share ``part`` (from 0) of the ``parts`` of a
    batch.

    ``key`` decides what is dropped, and is the same for all shares of a batch. The numbers are a
    function of it and of the order of the draws alone: torch's global generators, which dropout
    and noise use, may be seeded apart in each share.
    """
    assert 0 <= part < parts, f"share {part} of {parts}"
    return _Within(_Share(part, parts, images, key))


def batch_key() -> int | None:
    """Key of the batch at hand, the same for all its shares; None outside :func:`batch_share`."""
    share = _current.get()
    return None if share is None else share.key


def redraw() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` of ``torch.utils.checkpoint``: what is computed again drops the same rows.

    Also where that happens outside of :func:`batch_share`, or in another thread.
    """
    return nullcontext(), _Within(_current.get())


class _AddRows(torch.autograd.Function):
    """``to.index_add(0, rows, found[: len(rows)], alpha=scale)``, which would keep ``found``."""

    @staticmethod
    def forward(
        ctx: Any,
        to: Float[Tensor, "n ..."],
        rows: Int64[Tensor, " k"],
        found: Float[Tensor, "m ..."],
        scale: float,
    ) -> Float[Tensor, "n ..."]:
        ctx.save_for_backward(rows)
        ctx.scale, ctx.found = scale, (len(found), found.dtype)
        return to.index_add(0, rows, found[: len(rows)].to(to.dtype), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Float[Tensor, "n ..."]
    ) -> tuple[Tensor, None, Float[Tensor, "m ..."], None]:
        (rows,) = ctx.saved_tensors
        count, kind = ctx.found
        of_found = grad.new_zeros((count, *grad.shape[1:]), dtype=kind)
        of_found[: len(rows)] = grad.index_select(0, rows).mul_(ctx.scale)
        return grad, None, of_found, None


class _AddWhole(torch.autograd.Function):
    """``to + factors * found``, in the precision of ``to``: in bfloat16, 1 / 0.9 is 1.109.

    Autograd of the plain sum would move twice the bytes; autocast would copy ``found`` besides.
    """

    @staticmethod
    def forward(
        ctx: Any, to: Float[Tensor, "n ..."], found: Float[Tensor, "n ..."], factors: Tensor
    ) -> Float[Tensor, "n ..."]:
        ctx.save_for_backward(factors)
        ctx.kind = found.dtype
        with torch.autocast(to.device.type, enabled=False):
            return torch.addcmul(to, found, factors).to(to.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "n ..."]) -> tuple[Tensor, Tensor, None]:
        (factors,) = ctx.saved_tensors
        return grad, (grad * factors).to(ctx.kind), None


def add_whole(
    to: Float[Tensor, "n ..."], found: Float[Tensor, "n ..."], factors: Float[Tensor, " n"]
) -> Float[Tensor, "n ..."]:
    """``to``, and ``found`` times the factor of each row: what stochastic depth makes of a branch
    that was computed of all rows."""
    added: Tensor = _AddWhole.apply(to, found, _by_row(factors, found))
    return added


def _by_row(factors: Float[Tensor, " n"], like: Float[Tensor, "n ..."]) -> Tensor:
    return factors.view(-1, *[1] * (like.ndim - 1))


class DropPath(layers.DropPath):
    """Stochastic depth (Huang et al. 2016) of a residual branch, one decision for each row.

    Inside :func:`batch_share` rows are images, view by view: all images' first crops, then all
    second ones. Decisions are drawn for the whole batch, (views, parts * images) of them, and
    this share's are used. Elsewhere they are drawn as by timm on CPUs, from torch's own generator.
    It is always on the CPU, so that the host knows them at once, and all devices decide alike.
    """

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """Rows, each times 0 or, with probability 1 - p, 1 / (1 - p); as it is in evaluation."""
        factors = self.factors(len(x))
        if factors is None:
            return x
        return x * _by_row(without_wait(factors.to(x.dtype), x.device), x)

    def factors(self, rows: int) -> Float[Tensor, " n"] | None:
        """Factor of each of so many rows; on the CPU. None where nothing is dropped."""
        if not self.training or self.drop_prob == 0:
            return None
        return self.draw(rows) * self._scale

    def add(
        self,
        to: Float[Tensor, "n ..."],
        x: Float[Tensor, "n ..."],
        branch: Callable[[Tensor, Tensor | None], Tensor],
    ) -> Float[Tensor, "n ..."]:
        """``to + self(branch(x))``, where the branch is computed of the rows that are kept, filled
        up to whole quarters of all.

        The branch must treat rows apart, and gets their indices (None: all); it is called even if
        none is kept.
        """
        if not self.training or self.drop_prob == 0:
            return to + branch(x, None)
        keeps = self.draw(len(x))
        kept, part = int(keeps.sum()), -(-len(x) // _NUMBERS)
        computed = -(-kept // part) * part
        if kept == len(x):
            return torch.add(to, branch(x, None), alpha=self._scale)
        if computed >= len(x):
            factors = without_wait(keeps * self._scale, x.device)
            return add_whole(to, branch(x, None), factors)
        # Those that are kept come first, in order.
        rows = keeps.int().argsort(descending=True, stable=True)[:computed]
        rows = without_wait(rows, x.device)
        found = branch(x.index_select(0, rows), rows)
        added: Tensor = _AddRows.apply(to, rows[:kept], found, self._scale)
        return added

    def draw(self, rows: int) -> Bool[Tensor, " n"]:
        """Rows that are kept of so many; on the CPU."""
        share, keep = _current.get(), 1 - self.drop_prob
        if share is None:
            return torch.empty(rows).bernoulli_(keep) > 0
        part, parts, images, key, drawn = share
        assert rows % images == 0, f"{rows} rows are no whole views of {images} images"
        _current.set(share._replace(drawn=drawn + 1))
        generator = torch.Generator().manual_seed(fold(key, drawn))
        kept = torch.empty(rows // images, parts * images).bernoulli_(keep, generator=generator)
        return kept[:, part * images : (part + 1) * images].flatten() > 0

    @property
    def _scale(self) -> float:
        return 1 / (1 - self.drop_prob) if self.scale_by_keep else 1.0


def factors_of(
    branches: Sequence[nn.Module], x: Float[Tensor, "n ..."]
) -> tuple[Float[Tensor, " n"], ...] | None:
    """Factors of the rows of x in each branch, in one copy to its device; None without
    stochastic depth, which they have all or none of them."""
    drawn = [branch.factors(len(x)) for branch in branches if isinstance(branch, DropPath)]
    found = [factors for factors in drawn if factors is not None]
    return without_wait(torch.stack(found), x.device).unbind() if found else None


def draw_for_whole_batch(network: nn.Module) -> None:
    """Replace timm's stochastic depth by :class:`DropPath` everywhere in a network.

    In the few networks of timm whose rows are windows of an image, decisions are as random, but
    depend on how a batch is split.
    """
    for parent in network.modules():
        for name, child in parent.named_children():
            if type(child) is layers.DropPath:
                setattr(parent, name, DropPath(child.drop_prob, child.scale_by_keep))
