"""The block that is trained against timm's: numbers, gradients, and the work it does."""

import copy
import inspect
import math
from functools import partial

import pytest
import torch
from timm.layers import Attention
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit.model.block import LeanAttention, LeanBlock, LeanEvaBlock, lean_blocks
from ssl_vit.model.drop_path import DropPath, batch_share, draw_for_whole_batch
from ssl_vit.model.execution import choose_attention

WIDTH, HEADS, TOKENS, IMAGES = 24, 3, 7, 6
SCALED = {"init_values": 0.3}
KINDS = {
    "plain": {},
    "without biases": {"qkv_bias": False, "proj_bias": False},
    "normed queries": {"qk_norm": True},
    "normed output": {"scale_attn_norm": True},
    "layer scale": SCALED,
    "dropout": {"attn_drop": 0.3, "proj_drop": 0.2},
    "another activation": {"act_layer": partial(torch.nn.GELU, approximate="tanh")},
    "normed hidden layer": {"scale_mlp_norm": True},
}


def blocks(**changes) -> tuple[Block, LeanBlock]:
    """timm's block and ours with the same random weights, in float64, training."""
    torch.manual_seed(0)
    theirs = Block(WIDTH, HEADS, **{"qkv_bias": True, **changes}).double().train()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(theirs)
    draw_for_whole_batch(ours)
    lean_blocks(ours)
    assert isinstance(ours, LeanBlock)
    assert type(ours.attn) is LeanAttention
    return theirs, ours


def rotary_blocks(**changes) -> tuple[EvaBlock, LeanEvaBlock]:
    """The same of timm's Eva."""
    torch.manual_seed(0)
    theirs = EvaBlock(WIDTH, HEADS, **changes).double().train()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(theirs)
    lean_blocks(ours)
    assert isinstance(ours, LeanEvaBlock)
    return theirs, ours


def tokens(images: int = IMAGES) -> torch.Tensor:
    """Random tokens, always the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, TOKENS, WIDTH, generator=generator, dtype=torch.float64)


def learn(block, x, rows=None):
    """The tokens ``rows`` of the output, and the gradients of input and weights; seeded."""
    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    if rows is None:
        out = block(x)
    else:
        out = block(x, rows=rows) if isinstance(block, LeanBlock) else block(x)[:, rows]
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(len(x), TOKENS, WIDTH, generator=generator, dtype=out.dtype)
    (out * weights[:, : out.shape[1]]).sum().backward()
    gradients = {name: p.grad for name, p in block.named_parameters()}
    block.zero_grad()
    return out.detach(), x.grad, gradients


def assert_alike(found, expected):
    """Both of ``learn``."""
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert found[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_gradients_are_timms(kind, device):
    """``device``: for which attention is chosen; it is computed on the CPU."""
    theirs, ours = blocks(**KINDS[kind])
    for block in (theirs, ours):
        choose_attention(block, torch.device(device))
    assert_alike(learn(ours, tokens()), learn(theirs, tokens()))


@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, None)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dropout"])
def test_some_rows_are_those_of_the_whole(kind, device, rows):
    theirs, ours = blocks(**KINDS[kind])
    for block in (theirs, ours):
        choose_attention(block, torch.device(device))
    assert_alike(learn(ours, tokens(), rows), learn(theirs, tokens(), rows))


@pytest.mark.parametrize("rows", [None, slice(4, None)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_not_attended_to_is_as_if_it_were_not_there(device, rows):
    """Numbers and gradients of the others are those without it."""
    theirs, ours = blocks()
    for block in (theirs, ours):
        choose_attention(block, torch.device(device))
    x = tokens()
    attended = torch.tensor([True] * 4 + [False, True, False])
    both = []
    for block, given in ((ours, x), (theirs, x[:, attended])):
        given = given.clone().requires_grad_()
        if block is ours:
            out = block(given, rows=rows, attended=attended)
            out = out[:, attended if rows is None else attended[rows]]
        else:
            out = block(given) if rows is None else block(given)[:, 4:]
        out.square().sum().backward()
        own = given.grad if block is theirs else given.grad[:, attended]
        both.append((out.detach(), own, {n: p.grad for n, p in block.named_parameters()}))
    assert_alike(*both)


def test_some_rows_of_another_attention():
    """Of a kind that computes all tokens alone."""

    class Other(Attention):
        pass

    theirs, ours = blocks()
    for block in (theirs, ours):
        block.attn.__class__ = Other
    rows = slice(2, 5)
    assert_alike(learn(ours, tokens(), rows), learn(theirs, tokens(), rows))


@pytest.mark.skipif("gated" not in inspect.signature(Attention).parameters, reason="older timm")
@pytest.mark.parametrize("rows", [None, slice(0, 2)])
def test_gated_attention(rows):
    theirs, ours = blocks()
    torch.manual_seed(4)
    theirs.attn = Attention(WIDTH, HEADS, qkv_bias=True, gated=True).double()
    ours.attn = copy.deepcopy(theirs.attn)
    lean_blocks(ours)
    for block in (theirs, ours):
        choose_attention(block, torch.device("cpu"))
    assert_alike(learn(ours, tokens(), rows), learn(theirs, tokens(), rows))


def test_a_mask_is_timms():
    theirs, ours = blocks()
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.float64).masked_fill_(
        torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf
    )
    for block in (theirs, ours):
        choose_attention(block, torch.device("cpu"))
    masked = ours(tokens(), attn_mask=mask)
    torch.testing.assert_close(masked, theirs(tokens(), attn_mask=mask))
    assert not torch.allclose(masked, ours(tokens()))


def test_what_stands_in_for_a_layer_is_used():
    """As with adapters; gradients on."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, x):
            return 2 * self.inner(x)

    theirs, ours = blocks()
    for block in (theirs, ours):
        block.mlp.fc2 = Doubled(block.mlp.fc2)
    assert_alike(learn(ours, tokens()), learn(theirs, tokens()))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_gradients_it_can_be_traced(device, tmp_path):
    theirs, ours = blocks()
    choose_attention(ours, torch.device(device))
    with torch.no_grad():
        traced = torch.jit.trace(ours, tokens())
        torch.jit.save(traced, tmp_path / "block.pt")
        torch.testing.assert_close(
            torch.jit.load(tmp_path / "block.pt")(tokens()), theirs(tokens())
        )


@pytest.mark.parametrize("rows", [None, slice(0, 1)])
@pytest.mark.parametrize("rate", [0.2, 0.95])
def test_stochastic_depth_computes_what_it_keeps(rate, rows):
    """The numbers of a block that computes all and drops then; at 0.95 some branch has no row."""
    _, ours = blocks(drop_path=rate)
    whole = copy.deepcopy(ours)
    whole.whole = True
    seen: list[list[int]] = [[], []]
    for block, counts in zip((ours, whole), seen, strict=True):
        for part in (block.attn, block.mlp):
            part.register_forward_pre_hook(lambda _, given, to=counts: to.append(len(given[0])))
    for key in range(8):
        with batch_share(0, 1, IMAGES // 2, key):
            found = learn(ours, tokens(), rows)
        with batch_share(0, 1, IMAGES // 2, key):
            assert_alike(found, learn(whole, tokens(), rows))
    assert set(seen[1]) == {IMAGES}
    assert len(set(seen[0])) > 1
    assert (0 in seen[0]) == (rate > 0.5)
    ours.eval()
    assert torch.equal(ours(tokens()), whole.eval()(tokens()))


def kept_for_backward(block, numbers):
    """How many tensors of so many numbers a block keeps."""
    choose_attention(block, torch.device("cpu"))
    storages: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        block(tokens())
    return sum(tensor.numel() == numbers for tensor in storages.values())


def test_the_hidden_layer_is_kept_once():
    """And GELU's output not at all; gradients are compared above."""
    hidden = 4 * IMAGES * TOKENS * WIDTH
    assert [kept_for_backward(block, hidden) for block in blocks()] == [2, 1]


@pytest.mark.parametrize("make", [blocks, rotary_blocks])
def test_layer_scale_keeps_no_more(make):
    """It scales weights, not tokens; timm's keeps what both branches give."""
    size = IMAGES * TOKENS * WIDTH
    plain, scaled = ([kept_for_backward(b, size) for b in make(**c)] for c in ({}, SCALED))
    assert scaled[0] == plain[0] + 2
    assert scaled[1] == plain[1]


def test_what_is_dropped_costs_nothing():
    """FLOPs of attention and MLP follow the rows that are kept, in whole quarters of all."""
    _, ours = blocks(drop_path=0.5)
    choose_attention(ours, torch.device("cpu"))

    def flops(x):
        with FlopCounterMode(display=False) as counter, batch_share(0, 1, len(x), 5):
            ours(x)
        return counter.get_total_flops()

    with batch_share(0, 1, 100, 5):
        kept = [int(DropPath(0.5).train().draw(100).sum()) for _ in range(2)]
    kept = [25 * math.ceil(k / 25) for k in kept]
    assert min(kept) < 100
    linear, attention = 2 * TOKENS * WIDTH**2, 4 * TOKENS**2 * WIDTH
    expected = kept[0] * (4 * linear + attention) + kept[1] * 8 * linear
    assert flops(tokens(100)) == expected
