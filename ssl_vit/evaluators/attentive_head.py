"""Attentive head: learnt queries attend to patch tokens, and a linear layer reads the answers."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.evaluators.linear_heads import SIGMA
from ssl_vit.model.execution import repeatable_attention

_QUERY_SIGMA = 0.02
_HEAD_WIDTH = 64


def heads_for(width: int) -> int:
    """Heads of 64 channels, as CAPI has them; one where that does not divide the width."""
    return width // _HEAD_WIDTH if width % _HEAD_WIDTH == 0 else 1


class AttentiveHead(nn.Module):
    """Attentive head on standardised tokens (b, n, D): cross-attention of learnt queries, linear.

    Of head h and query q the answer is ``V_h sum_i a_i x_i``, a the softmax over tokens of
    ``q_h . K_h x_i / sqrt(D / heads)``; the answers of all heads are joined. Queries are zero and V
    is the identity at first, so that training begins with the mean of the tokens. Keys and values
    have no bias: it would cancel in the softmax, and move to the linear layer.

    Args:
        width: D. ``heads`` must divide it.
        outputs: number of classes or labels.
        depth: 1 or more; all but one are self-attention blocks (pre-norm, MLP of 4 D) before it.
        per_class: one query for each output, which reads its own answer alone; else one for all.
        key: seed of the initial weights.
    """

    def __init__(
        self, width: int, outputs: int, heads: int, depth: int, per_class: bool, key: int
    ) -> None:
        super().__init__()
        assert width % heads == 0, f"{heads} heads do not divide {width}"
        self.heads, self.per_class = heads, per_class
        generator = torch.Generator().manual_seed(key)
        self.query = nn.Parameter(torch.zeros(outputs if per_class else 1, width))
        self.key = nn.Parameter(_QUERY_SIGMA * torch.randn(width, width, generator=generator))
        self.value = nn.Parameter(torch.eye(width))
        self.weight = nn.Parameter(SIGMA * torch.randn(outputs, width, generator=generator))
        self.bias = nn.Parameter(torch.zeros(outputs))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key)
            blocks = [Block(width, heads, qkv_bias=True) for _ in range(depth - 1)]
        self.blocks = nn.Sequential(*blocks)
        repeatable_attention(self.blocks)

    def pool(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b q d"]:
        """Answers to the queries.

        Queries do not depend on the image: K and V are applied to them and to the weighted sums,
        which are few, instead of to each token.
        """
        tokens = self.blocks(tokens)
        value = self.value.unflatten(0, (self.heads, -1))
        sums = (self._weights(tokens) @ tokens).unflatten(1, (self.heads, -1))
        return torch.einsum("bhqd,hed->bqhe", sums, value).flatten(2)

    def attention(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b h q n"]:
        """Attention of each query in each head, which sums to one over the tokens."""
        return self._weights(self.blocks(tokens)).unflatten(1, (self.heads, -1))

    def _weights(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b hq n"]:
        """Attention to tokens that have been through the blocks, head by head."""
        query, key = (
            self.query.unflatten(1, (self.heads, -1)),
            self.key.unflatten(0, (self.heads, -1)),
        )
        asked = torch.einsum("qhe,hed->hqd", query, key) * key.shape[1] ** -0.5
        return (asked.flatten(0, 1) @ tokens.mT).softmax(2)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b c"]:
        """Logits of all outputs."""
        answers = self.pool(tokens)
        if self.per_class:
            return (answers * self.weight).sum(2) + self.bias
        return F.linear(answers[:, 0], self.weight, self.bias)

    def cells(self, tokens: int) -> int:
        """Numbers that an image of so many tokens takes while training, about."""
        asked, width = self.heads * len(self.query), self.key.shape[0]
        wide = width * (2 * asked + tokens * (1 + 16 * len(self.blocks)))
        return wide + asked * tokens * 2 + self.heads * tokens**2 * 2 * len(self.blocks)


def alike(head: AttentiveHead, settings: Sequence[float]) -> dict[float, AttentiveHead]:
    """A copy of a head for each setting: they begin with the same weights."""
    return {setting: copy.deepcopy(head) for setting in settings}
