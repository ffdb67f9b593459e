"""Given weights for images of other channels and patches of another size."""

import pytest
import torch
from sklearn.datasets import load_sample_images
from timm.layers import resample_patch_embed
from torch.nn import functional as F

from ssl_vit.common.config import EncoderConfig, InitConfig
from ssl_vit.common.errors import UserError
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.adapting import adapted, choose_filters, with_channels
from tests.unit.foreign_weights import noisy

SMALL = {"width": 16, "depth": 1, "heads": 2}
CONFIG = EncoderConfig("vit_tiny_patch16_224", image_size=(32,), patch_size=8, **SMALL)
PROJECTION = "patch_embed.proj.weight"


def made(channels=3, config=CONFIG):
    return noisy(Encoder(config, channels))


@pytest.mark.parametrize(
    ("how", "given", "wanted", "taken"),
    [
        ("mean", 3, 5, (0, 1, 2, None, None)),
        ("mean", 3, 1, (None,)),
        ("mean", 3, 2, (None, None)),
        ("mean", 1, 3, (0, None, None)),
        ("mean", 4, 4, (0, 1, 2, 3)),
        ("repeat", 3, 5, (0, 1, 2, 0, 1)),
        ("repeat", 3, 3, (0, 1, 2)),
        ("blue,green,red,mean", 3, 4, (2, 1, 0, None)),
        ("mean,mean", 3, 2, (None, None)),
        ("3,0", 4, 2, (3, 0)),
    ],
)
def test_which_channel_gets_which_filter(how, given, wanted, taken):
    """Each is scaled by given / wanted; what is not the first projection is left alone."""
    assert choose_filters(how, given, wanted, "x") == taken
    source, target = made(given), made(wanted)
    state, notes = adapted(source, target, how, "x")
    own = source.vit.state_dict()
    filters = own[PROJECTION]
    mean = filters.mean(1)
    for channel, number in enumerate(taken):
        expected = (mean if number is None else filters[:, number]) * given / wanted
        torch.testing.assert_close(state[PROJECTION][:, channel], expected)
    assert all(torch.equal(state[k], v) for k, v in own.items() if k != PROJECTION)
    target.vit.load_state_dict(state, strict=True)
    assert bool(notes) == (taken != tuple(range(given)))
    if notes and given != wanted:
        assert notes[0].endswith(f", all times {given}/{wanted}")


def test_what_is_done_is_said():
    assert adapted(made(), made(4), "mean", "x")[1] == [
        "filters of 4 channels: red, green, blue, mean, all times 3/4"
    ]
    assert adapted(made(), made(13), "mean", "x")[1] == [
        "filters of 13 channels: red, green, blue, 10 x mean, all times 3/13"
    ]
    assert adapted(made(), made(3), "blue,green,red", "x")[1] == [
        "filters of 3 channels: blue, green, red"
    ]
    assert adapted(made(4), made(2), "3,0", "x")[1] == [
        "filters of 2 channels: 3, 0, all times 4/2"
    ]


@pytest.mark.parametrize(
    ("how", "given", "message"),
    [
        ("red,green", 3, r"x: filters 'red,green' are 2; --data.channels is 4"),
        ("red,green,blue,nir", 3, "for its 3 channels: mean or repeat, .*mean, 0, 1, 2, red"),
        ("red,mean,mean,mean", 5, "for its 5 channels: mean or repeat, .*mean, 0, 1, 2, 3, 4$"),
        ("0,1,2,3", 3, "allowed for its 3 channels"),
    ],
)  # fmt: skip
def test_names_that_do_not_fit(how, given, message):
    with pytest.raises(UserError, match=message):
        adapted(made(given), made(4), how, "x")


@pytest.mark.parametrize("text", ["", "red,,blue", ","])
def test_an_option_without_names(text):
    with pytest.raises(UserError, match=r"--init.channels is .*it must be mean, repeat, or a name"):
        InitConfig(channels=text)


def photographs(channels):
    """Photographs of so many bands that are alike, as neighbouring wavelengths are: each a mixture
    of red, green and blue, and a little noise."""
    rgb = torch.stack([torch.from_numpy(i.copy()) for i in load_sample_images().images])
    rgb = F.interpolate(rgb.permute(0, 3, 1, 2).float() / 255, (96, 96), mode="area")
    rgb = (rgb - rgb.mean((0, 2, 3), True)) / rgb.std((0, 2, 3), keepdim=True)
    if channels == 3:
        return rgb
    generator = torch.Generator().manual_seed(0)
    mixture = torch.rand(channels, 3, generator=generator)
    bands = torch.einsum("nc,bchw->bnhw", mixture / mixture.sum(1, keepdim=True), rgb)
    bands = bands + 0.1 * torch.randn(bands.shape, generator=generator)
    return bands / bands.std((0, 2, 3), keepdim=True)


@pytest.mark.parametrize("how", ["mean", "repeat"])
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_activations_keep_their_scale(how, channels):
    """After the patch projection, of filters alike in all channels, as most trained ones are. A
    plain mean without the scale makes them as much larger as there are more channels."""
    generator = torch.Generator().manual_seed(0)
    shared, own = torch.randn(2, 64, 3, 8, 8, generator=generator)
    filters = shared[:, :1] + 0.3 * own
    before = F.conv2d(photographs(3), filters, stride=8).std()
    taken = choose_filters(how, 3, channels, "x")
    after = F.conv2d(photographs(channels), with_channels(filters, taken), stride=8).std()
    assert 0.8 < after / before < 1.2
    unscaled = with_channels(filters, taken) * (channels / 3)
    ratio = F.conv2d(photographs(channels), unscaled, stride=8).std() / before
    assert ratio == pytest.approx(channels / 3, rel=0.2)
    if channels > 1:
        assert ratio > 1.2
    else:
        assert ratio < 0.5


def test_gray_images_of_one_channel_are_those_of_three_that_are_equal():
    """Exactly: the one filter is the sum of the three."""
    source, target = made(3), made(1)
    target.vit.load_state_dict(adapted(source, target, "mean", "x")[0])
    gray = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = target(gray), source(gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(found.patches, expected.patches, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch", [4, 16])
def test_another_patch_size(patch):
    """By FlexiViT's pseudo-inverse: exact where patches grow, as tokens of enlarged images are."""
    config = EncoderConfig("vit_tiny_patch16_224", (4 * patch,), patch, **SMALL)
    source, target = made(), made(config=config)
    state, notes = adapted(source, target, "mean", "x")
    own = source.vit.state_dict()
    expected = resample_patch_embed(own[PROJECTION], [patch, patch])
    assert torch.equal(state[PROJECTION], expected)
    assert notes == [
        f"filters of 8 pixels are resized to patches of {patch} by pseudo-inverse (FlexiViT)"
    ]
    assert torch.equal(state["pos_embed"], own["pos_embed"])  # as many patches as before
    target.vit.load_state_dict(state, strict=True)
    if patch == 16:
        small = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        large = F.interpolate(small, (16, 16), mode="bicubic", antialias=True)
        tokens = F.conv2d(small, own[PROJECTION]), F.conv2d(large, state[PROJECTION])
        torch.testing.assert_close(tokens[1], tokens[0], atol=1e-3, rtol=1e-3)


def test_rotary_encoders():
    """There are no positions to resample; all but the filters stays as it is."""
    rotary = EncoderConfig("vit_small_plus_patch16_dinov3_qkvb", (32,), 8, **SMALL)
    wide = EncoderConfig(rotary.arch, (16, 64), 16, **SMALL)
    source, target = made(config=rotary), made(4, wide)
    state, notes = adapted(source, target, "red,green,blue,mean", "x")
    assert notes[0] == "filters of 4 channels: red, green, blue, mean, all times 3/4"
    assert "resized to patches of 16" in notes[1]
    own = source.vit.state_dict()
    assert all(torch.equal(state[k], v) for k, v in own.items() if k != PROJECTION)
    target.vit.load_state_dict(state, strict=True)


def test_channels_and_patches_together():
    config = EncoderConfig("vit_tiny_patch16_224", (64, 32), 16, **SMALL)
    source, target = made(), made(2, config)
    state, notes = adapted(source, target, "repeat", "x")
    assert len(notes) == 2
    assert state[PROJECTION].shape == (16, 2, 16, 16)
    assert state["pos_embed"].shape == (1, 1 + 8, 16)
    target.vit.load_state_dict(state, strict=True)
