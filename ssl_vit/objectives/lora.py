"""Low-rank adapters, LoRA (Hu et al. 2021, arXiv 2106.09685): matrices move by a small product.

The network stays as it is: its matrices hold what the adapters add at every moment, so that a
teacher, an export or an evaluation sees a plain encoder, and nothing is merged at the end. What is
trained is the two factors: their gradients follow from the matrix', which is freed at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_vit.common.distributed import rank_and_world
from ssl_vit.model.encoder import Encoder


def _key(name: str) -> str:
    return name.replace(".", "_")


class Adapters(nn.Module):
    """Low-rank adapters: for each linear layer of an encoder's blocks, W of (out, in), a product
    ``up @ down`` that is added to it: (out, rank) zeros at first, and (rank, in) normal of variance
    1 / in.

    All other parameters of the encoder are frozen.
    """

    def __init__(self, encoder: Encoder, rank: int) -> None:
        super().__init__()
        layers = encoder.vit.blocks.named_modules()
        self.names = [f"{n}.weight" for n, part in layers if isinstance(part, nn.Linear)]
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        encoder.requires_grad_(False)
        for name in self.names:
            weight = encoder.vit.blocks.get_parameter(name)
            out, into = weight.shape
            down = torch.randn(rank, into) / into**0.5
            # They get their gradients by hand: no graph, and no wrapper, has to know of them.
            self.down[_key(name)] = nn.Parameter(down, requires_grad=False)
            self.up[_key(name)] = nn.Parameter(torch.zeros(out, rank), requires_grad=False)
            weight.requires_grad_()
            weight.register_post_accumulate_grad_hook(self._at_once(name))
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    def _at_once(self, name: str) -> Callable[[Tensor], None]:
        """Hook that frees a matrix' gradient when it is there; of several processes it has to be
        reduced first."""

        def free(weight: Tensor) -> None:
            if rank_and_world()[1] == 1:
                self._take(name, weight)

        return free

    def _take(self, name: str, weight: Tensor) -> None:
        """Factors' gradients from the matrix', which is freed."""
        down, up, grad = self.down[_key(name)], self.up[_key(name)], weight.grad
        if grad is None:
            return
        for factor, own in ((down, up.T @ grad), (up, grad @ down.T)):
            factor.grad = own if factor.grad is None else factor.grad.add_(own)
        weight.grad = None

    @torch.no_grad()
    def before_update(self, encoder: Encoder) -> None:
        """Called with gradients in place."""
        for name in self.names:
            self._take(name, encoder.vit.blocks.get_parameter(name))
            down, up = self.down[_key(name)], self.up[_key(name)]
            self._before[name] = down.clone(), up.clone()

    @torch.no_grad()
    def after_update(self, encoder: Encoder) -> None:
        """Called when the factors have moved, or not: the matrices follow."""
        for name, (down, up) in self._before.items():
            weight = encoder.vit.blocks.get_parameter(name)
            weight.add_(self.product(name) - up @ down)  # by 0 exactly, where nothing has moved
        self._before.clear()

    @staticmethod
    def block_of(name: str) -> int:
        """Number of the block that a parameter of this module belongs to."""
        return int(name.rpartition(".")[2].partition("_")[0])

    def product(self, name: str) -> Float[Tensor, "out into"]:
        """Product that is added to a matrix."""
        return self.up[_key(name)] @ self.down[_key(name)]
