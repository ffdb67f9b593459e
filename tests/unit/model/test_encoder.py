"""The encoder against timm's own forward pass, and what it refuses."""

import functools
import math
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.model.architecture import timm_kwargs, without_memory
from ssl_vit.model.encoder import Encoder, parameter_count, take
from ssl_vit.model.execution import choose_attention, compile_blocks
from ssl_vit.model.positions import sincos_positions
from ssl_vit.weights.exchange import resample_positions

SMALL = {"width": 48, "depth": 2, "heads": 4}
PLAIN = [
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_small_patch32_224",
    "vit_small_patch8_224",
    "vit_base_patch16_224",
    "vit_base_patch16_384",
    "vit_base_patch32_224",
    "vit_base_patch8_224",
    "vit_large_patch16_224",
    "vit_large_patch32_224",
    "vit_large_patch14_224",
    "vit_huge_patch14_224",
    "vit_giant_patch14_224",
    "vit_gigantic_patch14_224",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_reg4_dinov2",
]


def make(channels: int = 3, *, noisy: bool = True, **changes) -> Encoder:
    """A small encoder of which every tensor is random, so that none is without effect."""
    options = {"arch": "vit_tiny_patch16_224", "image_size": (16, 24), "patch_size": 4}
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**{**options, **SMALL, **changes}), channels).eval()
    if noisy:
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter.data, std=0.2)
    choose_attention(encoder, torch.device("cpu"))
    return encoder


def images(encoder: Encoder, size: tuple[int, int] = (), n: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, encoder.channels, *(size or encoder.image_size), generator=generator)


def agree(encoder: Encoder, x: torch.Tensor) -> None:
    """Our features are timm's, and of the kind it has."""
    with torch.no_grad():
        ours, theirs = encoder(x), encoder.vit.forward_features(x)
    vit = encoder.vit
    torch.testing.assert_close(
        ours.patches, theirs[:, vit.num_prefix_tokens :], atol=1e-4, rtol=1e-4
    )
    assert (ours.cls is None) == (vit.cls_token is None)
    if ours.cls is not None:
        torch.testing.assert_close(ours.cls, theirs[:, 0], atol=1e-4, rtol=1e-4)


# --- patches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_patchify_orders_row_column_channel(channels):
    """Against a loop over patches and pixels, non-square."""
    encoder = make(channels)
    x = images(encoder, (8, 12))
    patches = encoder.patchify(x)
    for i in range(2):
        for j in range(3):
            wanted = [
                x[:, c, 4 * i + p, 4 * j + q]
                for p in range(4)
                for q in range(4)
                for c in range(channels)
            ]
            assert torch.equal(patches[:, 3 * i + j], torch.stack(wanted, 1))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_base_patch16_clip_224"])
def test_embedding_is_timms_convolution(channels, arch):
    """The linear map over patches is the strided convolution, plus positions; CLIP has no bias."""
    encoder = make(channels, arch=arch)
    x = images(encoder)
    projection = encoder.vit.patch_embed.proj
    tokens = F.conv2d(x, projection.weight, projection.bias, stride=4).flatten(2).transpose(1, 2)
    expected = tokens + encoder.vit.pos_embed[:, 1:]
    torch.testing.assert_close(encoder.embed(x).values, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(16, 24), (24, 12)])
def test_embedding_some_patches_is_taking_them_from_all(size):
    """On the encoder's own grid and on another, every image with its own patches."""
    encoder = make()
    x = images(encoder, size)
    n = size[0] * size[1] // 16
    keep = torch.stack([torch.randperm(n)[:5], torch.randperm(n)[:5]])
    everything = encoder.embed(x).values
    tokens = encoder.embed(x, keep)
    kept = tokens.values
    assert torch.equal(tokens.places, keep)
    assert tokens.grid == (size[0] // 4, size[1] // 4)
    assert kept.shape == (2, 5, 48)
    for image in range(2):
        for place, patch in enumerate(keep[image]):
            torch.testing.assert_close(kept[image, place], everything[image, patch])
    assert torch.equal(take(everything, keep)[1, 2], everything[1, keep[1, 2]])


def test_patches_that_are_not_kept_are_never_embedded():
    """Their pixels, even NaN, have no influence; the projection works on the kept alone."""
    encoder = make()
    x = images(encoder)
    keep = torch.tensor([[3, 0, 7], [1, 2, 23]])
    kept = encoder.embed(x, keep).values
    hidden = torch.ones(2, 24, dtype=torch.bool)
    hidden.scatter_(1, keep, False)
    pixels = hidden.view(2, 1, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    spoiled = torch.where(pixels, torch.nan, x)
    assert torch.equal(encoder.embed(spoiled, keep).values, kept)
    with FlopCounterMode(display=False) as flops:
        encoder.embed(x, keep)
    assert flops.get_total_flops() == 2 * (2 * 3) * 48 * (4 * 4 * 3)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "aimv2_large_patch14_224"])
@pytest.mark.parametrize("size", [(16, 24), (24, 12)])
@pytest.mark.parametrize("some", [False, True])
def test_masked_patches_are_a_token_at_their_places(arch, size, some):
    """Patch by patch: the token instead of the projection, and the position added to both."""
    encoder = make(arch=arch, patch_size=4, image_size=(16, 24))
    x, vit = images(encoder, size), encoder.vit
    rows, cols = size[0] // 4, size[1] // 4
    n = rows * cols
    generator = torch.Generator().manual_seed(1)
    masked = torch.rand(2, n, generator=generator) < 0.5
    keep = torch.stack([torch.randperm(n, generator=generator)[:7] for _ in range(2)])
    token = torch.randn(48, generator=generator)
    position = encoder.positions((rows, cols))[1][0]
    found = encoder.embed(x, keep if some else None, masked, token)
    assert found.grid == (rows, cols)
    assert found.places is (keep if some else None)
    for image in range(2):
        places = keep[image].tolist() if some else range(n)
        assert found.values.shape[1] == len(places)
        for at, place in enumerate(places):
            top, left = 4 * (place // cols), 4 * (place % cols)
            patch = x[image, None, :, top : top + 4, left : left + 4]
            own = vit.patch_embed.norm(vit.patch_embed.proj(patch)[0, :, 0, 0])
            expected = (token if masked[image, place] else own) + position[place]
            torch.testing.assert_close(found.values[image, at], expected, atol=1e-5, rtol=1e-5)
    assert masked.any()
    assert not masked.all()


def test_a_masked_patch_does_not_reach_the_encoder_and_its_token_learns():
    encoder = make()
    x = images(encoder)
    masked = torch.zeros(2, 24, dtype=torch.bool)
    masked[0, 5] = masked[1, 20] = True
    pixels = masked.view(2, 1, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    token = torch.ones(48, requires_grad=True)
    values = encoder.embed(x, None, masked, token).values
    assert torch.equal(encoder.embed(x.masked_fill(pixels, 9), None, masked, token).values, values)
    assert not torch.equal(encoder.embed(x.masked_fill(pixels, 9)).values, values)
    values.sum().backward()
    assert token.grad.tolist() == [2.0] * 48


@pytest.mark.parametrize("size", [(16, 24), (24, 8), (4, 20)])
@pytest.mark.parametrize("channels", [1, 3, 13])
def test_unpatchify_is_the_inverse_of_patchify(size, channels):
    encoder = make(channels)
    x = images(encoder, size)
    patches = encoder.patchify(x)
    assert patches.shape == (2, size[0] * size[1] // 16, 16 * channels)
    assert encoder.grid_of(x) == (size[0] // 4, size[1] // 4)
    assert torch.equal(encoder.unpatchify(patches, encoder.grid_of(x)), x)


# --- the whole encoder --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "sincos"},
        {"registers": 2},
        {"layer_scale": 0.1},
        {"drop_path": 0.5},
        {"image_size": (16,)},
        {"arch": "vit_small_patch14_dinov2"},
        {"arch": "vit_small_patch14_reg4_dinov2"},
        {"arch": "vit_giant_patch14_dinov2"},
        {"arch": "vit_giant_patch14_reg4_dinov2"},
        {"norm": "pooled"},
        {"norm_eps": 0.5},
        {"arch": "vit_base_patch16_siglip_224"},
        {"arch": "vit_base_patch16_clip_224"},
        {"arch": "aimv2_large_patch14_224"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "plain",
)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_features_are_timms(changes, channels):
    """With learned and fixed positions, registers with and without them, no [CLS], layer scale."""
    encoder = make(channels, noisy=changes.get("positions") != "sincos", **changes)
    agree(encoder, images(encoder))


def test_every_arch_agrees_with_timm_or_is_refused():
    """All of timm's plain ViTs at small width and depth; a refusal names the option."""
    refusals, agreed = [], 0
    for arch in timm.list_models(module="vision_transformer"):
        try:
            encoder = make(arch=arch, image_size=(8, 12))
        except UserError as error:
            refusals.append(str(error))
            continue
        agree(encoder, images(encoder))
        agreed += 1
    assert agreed > 100
    assert all("--encoder.arch is" in refusal for refusal in refusals)


@pytest.mark.parametrize("arch", PLAIN)
def test_plain_archs_build_with_timms_keys(arch):
    """At full size (without memory), as timm builds them."""
    with without_memory():
        encoder = Encoder(EncoderConfig(arch=arch))
        vit = timm.create_model(arch, num_classes=0)
    theirs = {k: v.shape for k, v in vit.state_dict().items()}
    assert {k: v.shape for k, v in encoder.vit.state_dict().items()} == theirs
    assert parameter_count(encoder) == sum(p.numel() for p in vit.parameters())
    assert encoder.image_size == vit.patch_embed.img_size


class Ran(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_without_memory_nothing_is_initialised(arch):
    """Of a large network that takes seconds."""
    with Ran() as ran, without_memory():
        timm.create_model(arch, num_classes=0)
    assert "empty" in ran.names
    assert ran.names.isdisjoint({"uniform_", "normal_", "erfinv_", "clamp_", "fill_", "zero_"})


def test_weights_load_into_timms_own_call():
    """``timm_kwargs`` is the call that builds the same model."""
    encoder = make(5, registers=3, layer_scale=0.1)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, **timm_kwargs(encoder.config, 5)
    ).eval()
    vit.load_state_dict(encoder.vit.state_dict(), strict=True)
    x = images(encoder)
    with torch.no_grad():
        theirs = vit.forward_features(x)
        torch.testing.assert_close(encoder(x).cls, theirs[:, 0], atol=1e-4, rtol=1e-4)


def test_drop_path_grows_to_the_last_block():
    encoder = make(depth=4, drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.vit.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


# --- positions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (3, 6), (2, 8)])
def test_a_smaller_grid_is_resampled_as_dino_does(grid):
    """Bicubic weights (a = -.75) at centres scaled by own / (new + .1), edges repeated; a loop."""
    encoder = make(registers=0)
    position = encoder.vit.pos_embed.detach().double()[0, 1:].unflatten(0, (4, 6))

    def weights(new: int, own: int) -> torch.Tensor:
        matrix = torch.zeros(new, own, dtype=torch.float64)
        for i in range(new):
            at = (i + 0.5) * own / (new + 0.1) - 0.5
            for j in range(math.floor(at) - 1, math.floor(at) + 3):
                t = abs(at - j)
                w = 1.25 * t**3 - 2.25 * t**2 + 1
                w = w if t <= 1 else -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
                matrix[i, min(max(j, 0), own - 1)] += w
        return matrix

    rows, columns = weights(grid[0], 4), weights(grid[1], 6)
    expected = torch.einsum("ih,jw,hwd->ijd", rows, columns, position).flatten(0, 1)
    found = encoder.positions(grid)[1][0].double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_a_larger_grid_is_resampled_as_timm_does(arch, size):
    encoder = make(arch=arch)
    grid = (size[0] // 4, size[1] // 4)
    position = encoder.vit.pos_embed
    prefix = position.shape[1] - 24
    theirs = resample_abs_pos_embed(position, list(grid), old_size=[4, 6], num_prefix_tokens=prefix)
    torch.testing.assert_close(encoder.positions(grid)[1], theirs[:, prefix:])
    kwargs = timm_kwargs(encoder.config) | {"dynamic_img_size": True}
    vit = timm.create_model(arch, num_classes=0, **kwargs).eval()
    vit.load_state_dict(encoder.vit.state_dict(), strict=True)
    x = images(encoder, size)
    with torch.no_grad():
        features, expected = encoder(x), vit.forward_features(x)
    assert features.grid == grid
    torch.testing.assert_close(
        features.patches, expected[:, vit.num_prefix_tokens :], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(features.cls, expected[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("size", [(32, 32), (12, 40), (16, 24)])
def test_weights_for_another_image_size(arch, size):
    """Positions as timm resamples them, those of prefix tokens kept, all else the same object."""
    source, target = make(arch=arch), make(arch=arch, image_size=size)
    state = source.vit.state_dict()
    found = resample_positions(state, source, target)
    prefix = 1 if arch == "vit_tiny_patch16_224" else 0
    theirs = resample_abs_pos_embed(
        state["pos_embed"], list(target.grid), old_size=[4, 6], num_prefix_tokens=prefix
    )
    torch.testing.assert_close(found["pos_embed"], theirs)
    assert torch.equal(found["pos_embed"][:, :prefix], state["pos_embed"][:, :prefix])
    assert all(found[k] is state[k] for k in state if k != "pos_embed")
    target.vit.load_state_dict(found, strict=True)
    if size == (32, 32):  # on a larger grid an encoder resamples its own alike
        x = images(source, size)
        with torch.no_grad():
            torch.testing.assert_close(target(x).patches, source(x).patches, atol=1e-5, rtol=1e-5)


def test_weights_for_other_prefix_tokens_are_refused():
    source, target = make(), make(registers=2, image_size=(8, 8))
    with pytest.raises(UserError, match=r"positions of 1 prefix tokens do not fit .* with 3"):
        resample_positions(source.vit.state_dict(), source, target)


@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (2, 5)])
@pytest.mark.parametrize("width", [4, 12, 48])
def test_sincos_is_the_papers(grid, width):
    """Against a loop: column then row, sines then cosines, frequencies 10000^(-i / (D/4))."""
    found = sincos_positions(grid, width)
    quarter = width // 4
    for row in range(grid[0]):
        for col in range(grid[1]):
            expected = [
                wave(place / 10000 ** (i / quarter))
                for place in (col, row)
                for wave in (math.sin, math.cos)
                for i in range(quarter)
            ]
            assert found[row * grid[1] + col].tolist() == pytest.approx(expected, abs=1e-6)


def test_sincos_positions_are_fixed_and_leave_the_prefix_alone():
    """[CLS] and registers get none; the values are not trained, and are in the state dict."""
    encoder = make(noisy=False, positions="sincos", registers=2)
    position = encoder.vit.pos_embed
    assert not position.requires_grad
    assert position.shape == (1, 3 + 24, 48)
    assert position[:, :3].abs().max() == 0
    assert torch.equal(position[0, 3:], sincos_positions((4, 6), 48))
    assert make().vit.pos_embed.requires_grad


# --- parts of the features ----------------------------------------------------------------------


def test_intermediate_features():
    """The last equals forward; each equals a shallower encoder's output; order is kept."""
    encoder = make(depth=4)
    x = images(encoder)
    with torch.no_grad():
        found = encoder.intermediate(x, last=3)
        whole = encoder(x)
        assert len(found) == 3
        assert torch.equal(found[-1].patches, whole.patches)
        assert torch.equal(found[-1].cls, whole.cls)
        for dropped, features in zip((2, 1), found[:2], strict=True):
            shallow = make(depth=4 - dropped)
            state = {k: v for k, v in encoder.state_dict().items() if k in shallow.state_dict()}
            shallow.load_state_dict(state)
            torch.testing.assert_close(features.patches, shallow(x).patches)
    for last in (0, 5):
        with pytest.raises(UserError, match="the encoder has 4"):
            encoder.intermediate(x, last=last)


def test_encode_puts_the_prefix_in_front():
    """[CLS] first, registers next; ``split`` leaves the registers out."""
    encoder = make(registers=2)
    x = images(encoder)
    with torch.no_grad():
        tokens = encoder.encode(encoder.embed(x))
        features = encoder(x)
    assert tokens.shape == (2, 1 + 2 + 24, 48)
    assert torch.equal(tokens[:, 0], features.cls)
    assert torch.equal(tokens[:, 3:], features.patches)


def test_encode_does_not_see_the_order_of_patches():
    encoder = make()
    tokens = encoder.embed(images(encoder))
    order = torch.randperm(24)
    with torch.no_grad():
        a, b = (
            encoder.encode(tokens),
            encoder.encode(replace(tokens, values=tokens.values[:, order])),
        )
    torch.testing.assert_close(a[:, 1:][:, order], b[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a[:, 0], b[:, 0], atol=1e-5, rtol=1e-5)


def test_pooling():
    features = make()(images(make()))
    torch.testing.assert_close(features.pool("mean"), features.patches.sum(1) / 24)
    assert torch.equal(features.pool("cls"), features.cls)
    assert features.pool("cls+mean").shape == (2, 96)
    assert torch.equal(features.pool("cls+mean")[:, :48], features.cls)
    with pytest.raises(UserError, match="pooling is 'max'; allowed: cls, mean"):
        features.pool("max")
    bare = make(arch="vit_base_patch16_siglip_224")
    with pytest.raises(UserError, match="has no"):
        bare(images(bare)).pool("cls")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_a_norm_after_the_pooling_is_timms(arch, channels):
    """Tokens have none, pooled vectors have it; ``timm_kwargs`` says so to timm."""
    encoder = make(channels, arch=arch, norm="pooled")
    kwargs = timm_kwargs(encoder.config, channels)
    vit = timm.create_model(arch, num_classes=0, **kwargs).eval()
    vit.load_state_dict(encoder.vit.state_dict(), strict=True)
    x = images(encoder)
    with torch.no_grad():
        features, tokens = encoder(x), vit.forward_features(x)
        theirs = vit.forward_head(tokens, pre_logits=True)
        cls = vit.fc_norm(tokens[:, 0])
    torch.testing.assert_close(features.pool("mean"), theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.pool("cls"), cls, atol=1e-5, rtol=1e-5)
    both = torch.cat([cls, theirs], dim=1)
    torch.testing.assert_close(features.pool("cls+mean"), both, atol=1e-5, rtol=1e-5)
    assert (theirs - tokens[:, vit.num_prefix_tokens :].mean(1)).abs().max() > 0.1


def test_epsilon_of_every_norm():
    """Its own where none is given; with a large one features are those of timm's model with it."""
    own, changed = make(), make(norm_eps=0.5)
    norms = [m for m in changed.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 2 + 1
    assert {m.eps for m in norms} == {0.5}
    assert {m.eps for m in own.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    layer = functools.partial(torch.nn.LayerNorm, eps=0.5)
    kwargs = timm_kwargs(changed.config) | {"norm_layer": layer}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs).eval()
    vit.load_state_dict(changed.vit.state_dict(), strict=True)
    x = images(changed)
    with torch.no_grad():
        theirs = vit.forward_features(x)
        torch.testing.assert_close(changed(x).cls, theirs[:, 0], atol=1e-5, rtol=1e-5)
        assert (own(x).cls - theirs[:, 0]).abs().max() > 0.01


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "vit_smal_patch16_224"}, r"--encoder.arch.*nearest.*vit_small_patch16_224"),
        ({"arch": "swin_tiny_patch4_window7_224"}, "--encoder.arch.*plain ViT"),
        ({"arch": "vit_base_patch16_rope_224"}, "--encoder.arch.*plain ViT"),
        ({"arch": "resnet50"}, "--encoder.arch.*plain ViT"),
        ({"arch": "vit_small_patch16_18x2_224"}, "--encoder.arch.*plain ViT"),
        ({"norm_eps": 1.0}, r"--encoder.norm-eps is 1; it must lie in \[0, 1\)"),
        ({"image_size": (16, 18)}, r"--encoder.image-size is 16x18.*divisible.*4"),
        ({"image_size": (30,)}, r"--encoder.image-size is 30.*divisible.*4"),
        ({"image_size": (0,)}, r"--encoder.image-size"),
        ({"patch_size": 5}, r"--encoder.image-size is 16x24.*patch size, 5"),
        ({"heads": 5}, r"--encoder.heads is 5; it must divide the width, 48"),
        ({"width": 50, "heads": 0}, r"--encoder.heads is 3; it must divide the width, 50"),
        ({"width": 50, "heads": 5, "positions": "sincos"}, "divisible by 4, not 50"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_an_image_that_does_not_divide_into_patches_is_refused():
    encoder = make()
    with pytest.raises(UserError, match="16x22 pixels does not divide into patches of 4"):
        encoder(torch.zeros(1, 3, 16, 22))


@pytest.mark.parametrize("in_parts", [False, True])
def test_blocks_are_compiled_whole_or_in_parts(in_parts):
    encoder = make(depth=3, drop_path=0.2)
    compile_blocks(encoder, in_parts)
    for block in encoder.vit.blocks:
        assert block.whole
        assert block.compiled is not in_parts
        assert (block.attn._compiled_call_impl is not None) is in_parts
