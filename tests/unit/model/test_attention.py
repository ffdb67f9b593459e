"""Attention of [CLS] against loops and timm's own; the sets that hold a share; the picture."""

import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
from timm.layers import Attention
from torch import nn

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.figures import enlarged, heat, picture_rows
from ssl_vit.model.attention import (
    attention_panel,
    cls_attention,
    cls_attention_rows,
    cls_features,
    head_colours,
    mass_mask,
)
from ssl_vit.model.block import LeanAttention
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.execution import choose_attention
from tests.unit.model.test_encoder import images, make

DINOV2 = {"arch": "vit_base_patch14_reg4_dinov2", "image_size": (28, 42), "patch_size": 14}


def by_loops(encoder, x):
    """softmax(q k^T / sqrt(d)) of the first token, one number at a time."""
    tokens = encoder.with_prefix(encoder.embed(x))
    for block in encoder.vit.blocks[:-1]:
        tokens = block(tokens)
    block = encoder.vit.blocks[-1]
    heads = block.attn.num_heads
    d = encoder.width // heads
    weight, bias = block.attn.qkv.weight.double(), block.attn.qkv.bias.double()
    rows = torch.zeros(len(x), heads, tokens.shape[1], dtype=torch.float64)
    for b, tokens_b in enumerate(block.norm1(tokens).double()):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            key = slice(encoder.width + h * d, encoder.width + (h + 1) * d)
            q = weight[part] @ tokens_b[0] + bias[part]
            scores = []
            for token in tokens_b:
                k = weight[key] @ token + bias[key]
                scores.append(sum(float(q[i] * k[i]) for i in range(d)) / math.sqrt(d))
            exps = [math.exp(s - max(scores)) for s in scores]
            rows[b, h] = torch.tensor([e / sum(exps) for e in exps])
    return rows


def by_timm(encoder, x):
    """The probabilities that timm's plain attention gives to its dropout in the last block."""
    caught = []
    attention = encoder.vit.blocks[-1].attn
    attention.__class__ = Attention
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    encoder(x)
    handle.remove()
    attention.__class__ = LeanAttention
    return caught[0][:, :, 0]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("changes", [{}, {"registers": 3}, DINOV2])
def test_rows_against_loops(changes):
    encoder = make(**changes)
    x = images(encoder)
    torch.testing.assert_close(
        cls_attention_rows(encoder, x), by_loops(encoder, x).float(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("size", [(), (32, 12)])
@pytest.mark.parametrize("changes", [{}, {"registers": 2}, {"heads": 1}, {"layer_scale": 0.5}])
def test_patches_against_timms_softmax(changes, size):
    encoder = make(**changes)
    x = images(encoder, size)
    choose_attention(encoder, torch.device("cuda"))  # fused: the probabilities exist nowhere
    attention, grid = cls_attention(encoder, x)
    prefix = encoder.vit.num_prefix_tokens
    assert grid == (x.shape[2] // 4, x.shape[3] // 4)
    torch.testing.assert_close(attention, by_timm(encoder, x)[:, :, prefix:], rtol=1e-5, atol=1e-7)
    rows = cls_attention_rows(encoder, x)
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]))
    assert rows.shape[2] == prefix + attention.shape[2]


def test_normalised_queries_and_keys():
    encoder = make()
    for block in encoder.vit.blocks:
        block.attn.q_norm, block.attn.k_norm = nn.LayerNorm(12), nn.LayerNorm(12)
        nn.init.normal_(block.attn.q_norm.weight)
        nn.init.normal_(block.attn.k_norm.bias)
    x = images(encoder)
    torch.testing.assert_close(cls_attention_rows(encoder, x), by_timm(encoder, x))


def test_softmax_is_in_float32_under_autocast_and_stays_float64():
    encoder = make()
    x = images(encoder)
    plain = cls_attention_rows(encoder, x)
    with torch.autocast("cpu", torch.bfloat16):
        rows = cls_attention_rows(encoder, x)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 4))
    assert (rows - plain).abs().max() < 0.1
    assert cls_attention_rows(encoder.double(), x.double()).dtype == torch.float64


def test_patches_are_numbered_row_by_row():
    """A patch that alone differs is where the attention differs from that to the others."""
    encoder = make(depth=1)
    nn.init.zeros_(encoder.vit.pos_embed)
    x = torch.zeros(1, 3, 16, 24)
    x[:, :, 4:8, 16:20] = 1.0
    attention, grid = cls_attention(encoder, x)
    maps = attention.unflatten(-1, grid)[0]
    assert ((maps - maps[:, :1, :1]).abs() > 1e-4).any(0).nonzero().tolist() == [[1, 4]]


def test_refusals():
    without = make(arch="vit_base_patch16_siglip_224")
    with pytest.raises(UserError, match=r"which is asked for"):
        cls_attention(without, images(without))
    encoder = make()
    with pytest.raises(UserError, match=r"17x24 pixels .* patches of 4"):
        cls_attention(encoder, torch.zeros(1, 3, 17, 24))


@pytest.mark.parametrize("mass", [0.01, 0.25, 0.6, 0.95, 1.0])
def test_mass_mask_is_the_smallest_set_that_holds_the_mass(mass):
    generator = torch.Generator().manual_seed(2)
    attention = torch.rand(3, 2, 30, generator=generator).double() ** 4
    mask = mass_mask(attention, mass)
    for row, kept in zip(attention.flatten(0, 1), mask.flatten(0, 1), strict=True):
        held, wanted = 0.0, set()
        for i in sorted(range(30), key=lambda i: -float(row[i])):
            if held >= mass * float(row.sum()) * (1 - 1e-12):
                break
            held += float(row[i])
            wanted.add(i)
        assert set(kept.nonzero().flatten().tolist()) == wanted


def test_mass_mask_in_plain_cases():
    attention = torch.tensor([[[1.0, 4.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    assert mass_mask(attention, 0.5).tolist() == [
        [[False, True, False, False], [True, True, False, False], [True, False, False, False]]
    ]
    # What patches get does not matter, only how it is shared among them.
    assert torch.equal(mass_mask(attention * 0.01, 0.6), mass_mask(attention, 0.6))


def lightness(rgb):
    """CIE L* of sRGB colours (..., 3) in 0..255."""
    linear = np.where(rgb > 10, ((rgb / 255 + 0.055) / 1.055) ** 2.4, rgb / 255 / 12.92)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > (6 / 29) ** 3, 116 * np.cbrt(y) - 16, y * 903.3)


def test_heat_is_ordered_by_lightness():
    values = np.linspace(0, 1, 256)
    light = lightness(heat(values).astype(float))
    assert light[0] < 5
    assert light[-1] > 95
    assert (np.diff(light[::5]) > 0).all()
    assert np.abs(light - np.interp(values, [0, 1], light[[0, -1]])).max() < 6


def test_neighbouring_heads_have_other_colours():
    hues = [colorsys.rgb_to_hsv(*(colour / 255))[0] for colour in head_colours(16)]
    apart = [min(abs(a - b), 1 - abs(a - b)) for a, b in itertools.pairwise(hues)]
    assert min(apart) > 0.3
    assert len(np.unique(head_colours(16), axis=0)) == 16


def panel_cell(picture, number, across, size):
    """A cell of a panel of one image, pixels (size, size, 3)."""
    line, column = divmod(number, across)
    y, x = 16 + line * (size + 4 + 16), 4 + column * (size + 4)
    return picture[y : y + size, x : x + size]


def test_panel_shows_where_attention_is():
    """One head on one patch, the other on another: their cells say so in the right place."""
    rgb = np.full((1, 100, 100, 3), 200, dtype=np.uint8)
    attention = torch.full((1, 2, 16), 0.001)
    attention[0, 0, 6] = attention[0, 1, 9] = 0.5  # (row 1, column 2) and (row 2, column 1)
    picture = attention_panel(rgb, attention, (4, 4))
    cells = [panel_cell(picture, i, 6, 100) for i in range(6)]
    at = {(1, 2): (slice(30, 45), slice(55, 70)), (2, 1): (slice(55, 70), slice(30, 45))}
    first, second, corner = at[1, 2], at[2, 1], (slice(5, 20), slice(5, 20))
    assert (cells[0] == 200).all()
    for spot in (first, second):
        assert cells[1][spot].mean() > cells[1][corner].mean() + 50
        assert (cells[2][spot] == 200).all()
    assert (cells[2][corner] < 120).all()
    colours = head_colours(2)
    for head, spot in enumerate((first, second)):
        painted = (0.3 * 200 + 0.7 * colours[head].astype(float)).round()
        assert np.abs(cells[3][spot] - painted).max() <= 1
        assert (cells[4 + head][spot] == heat(np.array(1.0))).all()
        assert (cells[4 + head][0] == colours[head]).all()  # the frame
    assert (cells[4][second] == heat(np.array(0.0))).all()


@pytest.mark.parametrize("heads", [1, 3, 12, 16])
def test_panel_stays_of_a_sensible_width(heads):
    rgb = np.zeros((2, 224, 224, 3), dtype=np.uint8)
    picture = attention_panel(rgb, torch.rand(2, heads, 196), (14, 14), 0.5)
    assert picture.shape[1] <= 1400
    assert picture.shape[0] >= 2 * -(-(4 + heads) // 6) * 224


def test_panel_of_small_images_that_are_not_square_and_flat_attention():
    rgb = np.zeros((1, 8, 12, 3), dtype=np.uint8)
    picture = attention_panel(rgb, torch.full((1, 2, 24), 1 / 24), (4, 6))
    assert picture.shape[1] > 6 * 96 * 1.5


def test_rows_of_one_line_have_one_row_of_titles():
    """Lines above nothing but the first image; wrapped, each line has its own."""
    cells = {str(i): np.zeros((3, 96, 96, 3), dtype=np.uint8) for i in range(4)}
    assert picture_rows(cells, "").shape == (16 + 3 * 100 + 16 + 4, 4 * 100 + 4, 3)
    assert picture_rows(cells, "", wrap=4).shape == picture_rows(cells, "").shape
    wrapped = picture_rows(cells, "", wrap=3)  # two lines of two
    assert wrapped.shape == (3 * (2 * 116 + 8) + 16 + 4, 2 * 100 + 4, 3)


def test_enlarging_keeps_pixels_square():
    small = np.arange(6, dtype=np.uint8).reshape(1, 2, 1, 3)
    large = enlarged(small, least=3)
    assert large.shape == (1, 6, 3, 3)
    assert (large[:, :3] == small[:, :1]).all()
    assert np.array_equal(enlarged(large, least=3), large)


# --- [CLS] for less work --------------------------------------------------------------------------

SHORT = {"arch": "vit_tiny_patch16_224", "image_size": (16,), "patch_size": 4, "width": 32}
SHORT |= {"depth": 3, "heads": 2}


@pytest.mark.parametrize("extra", [{}, {"registers": 3}, {"layer_scale": 0.3}])
@pytest.mark.parametrize("fused", [True, False])
@torch.enable_grad()
def test_cls_features_are_those_of_the_whole_encoder(extra, fused):
    """Values and gradients, for any kind of block, and for another size of image."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**SHORT, **extra)).double()
    for part in encoder.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    for shape in ((2, 3, 16, 16), (2, 3, 8, 12)):
        images = torch.randn(*shape, dtype=torch.float64)
        parameters = [p for p in encoder.parameters() if p.requires_grad]
        outputs = cls_features(encoder, images), encoder(images).cls
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
        ours, theirs = (torch.autograd.grad(o.square().sum(), parameters) for o in outputs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_cls_features_drop_the_same_paths():
    """Stochastic depth draws as many numbers, so that a step is the same one."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**SHORT, drop_path=0.5)).train()
    images = torch.randn(8, 3, 16, 16)
    outputs = []
    for features in (lambda: cls_features(encoder, images), lambda: encoder(images).cls):
        torch.manual_seed(1)
        outputs.append(features())
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
