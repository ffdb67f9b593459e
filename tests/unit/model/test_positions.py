"""Resampled positions: each family's own way, wherever an encoder or its weights change size."""

from dataclasses import replace

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F

from ssl_vit.common.config import EncoderConfig
from ssl_vit.methods.mae import MAE
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.positions import resampled
from ssl_vit.options.mae import MAEConfig
from ssl_vit.weights.exchange import resample_positions

OWN = (4, 6)
GRIDS = [(8, 9), (2, 3), (6, 4), (3, 12), (4, 5)]
KINDS = ["mixed", "timm", "mae", "dino"]


def make(resampling: str) -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig("vit_tiny_patch16_224", (16, 24), 4, 16, 1, 2, resampling=resampling)
    encoder = Encoder(config)
    torch.nn.init.normal_(encoder.vit.pos_embed)
    return encoder.eval()


def expected(kind: str, table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """What each library calls, written out."""
    if kind == "timm":
        return resample_abs_pos_embed(table, list(grid), list(OWN), num_prefix_tokens=0)
    image = table.reshape(1, *OWN, -1).permute(0, 3, 1, 2)
    if kind == "mae":
        made = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    else:
        factor = ((grid[0] + 0.1) / OWN[0], (grid[1] + 0.1) / OWN[1])
        made = F.interpolate(image, scale_factor=factor, mode="bicubic")
    assert made.shape[2:] == grid
    return made.permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_that_a_size_changes(kind, grid):
    """Features of images of another size, weights for another encoder, a method for another size:
    all by the encoder's own way, and also where only the shape is another, (6, 4) and (3, 12)."""
    encoder = make(kind)
    table = encoder.vit.pos_embed[:, 1:]
    smaller = grid[0] < OWN[0] or grid[1] < OWN[1]
    of_crops = ("dino" if smaller else "timm") if kind == "mixed" else kind
    of_weights = "timm" if kind == "mixed" else kind
    wanted = expected(of_crops, table, grid)
    torch.testing.assert_close(encoder.positions(grid)[1], wanted)
    size = (4 * grid[0], 4 * grid[1])
    x = torch.zeros(1, 3, *size)
    given = (encoder.embed(x).values - encoder.vit.patch_embed.proj.bias).detach()
    torch.testing.assert_close(given, wanted.detach())
    target = Encoder(replace(encoder.config, image_size=size))
    state = resample_positions(encoder.vit.state_dict(), encoder, target)
    torch.testing.assert_close(state["pos_embed"][:, 1:], expected(of_weights, table, grid).data)
    assert torch.equal(state["pos_embed"][:, :1], encoder.vit.pos_embed[:, :1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_method_for_another_size(kind):
    config = make(kind).config
    method = MAE(MAEConfig(decoder_width=16, decoder_depth=1, decoder_heads=2), config, 3)
    table = torch.nn.init.normal_(method.encoder.vit.pos_embed.data)[:, 1:]
    made = method.for_size((24, 16)).encoder
    assert made.config.resampling == kind
    wanted = expected("timm" if kind == "mixed" else kind, table, (6, 4))
    torch.testing.assert_close(made.vit.pos_embed.data[:, 1:], wanted)


def test_the_ways_differ():
    """By more than rounding, so that the tests above can fail."""
    table = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0))
    for grid in GRIDS:
        made = [resampled(table, OWN, grid, kind) for kind in ("timm", "mae", "dino")]
        # Antialiasing has other bicubic weights, so that it matters where the grid grows, too.
        assert (made[0] - made[1]).abs().max() > 0.1
        assert (made[1] - made[2]).abs().max() > 0.01
    assert resampled(table, OWN, OWN, "dino") is table


def test_half_precision_is_resampled_in_single():
    table = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = resampled(table, OWN, (5, 7), "timm")
    wanted = resampled(table.float(), OWN, (5, 7), "timm")
    assert torch.equal(made, wanted.bfloat16())
