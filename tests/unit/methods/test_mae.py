"""MAE's objective against loops, its initialisation, masks and pictures."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.common import figures
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.seeds import fold, uniform
from ssl_vit.common.task import Views
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods import method_names
from ssl_vit.methods.base import find_method
from ssl_vit.methods.mae import MAE
from ssl_vit.model.encoder import take
from ssl_vit.model.execution import choose_attention
from ssl_vit.options.mae import MAEConfig


def make(
    ratio: float = 0.75, channels: int = 3, normalize: bool = True, seed: int = 0, **encoder
) -> MAE:
    options = {"arch": "vit_tiny_patch16_224", "image_size": (16, 24), "patch_size": 4}
    options |= {"width": 48, "depth": 2, "heads": 4, "positions": "sincos"}
    config = MAEConfig(
        mask_ratio=ratio,
        normalize_target=normalize,
        decoder_width=32,
        decoder_depth=2,
        decoder_heads=4,
    )
    torch.manual_seed(seed)
    model = MAE(config, EncoderConfig(**{**options, **encoder}), channels).eval()
    choose_attention(model, torch.device("cpu"))
    return model


def batch(model: MAE, n: int = 3) -> Views:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, model.encoder.channels, *model.encoder.image_size, generator=generator)
    return Views([x], torch.tensor([fold(i) for i in range(n)]), torch.full((n,), -1))


def noise(model: MAE, views: Views) -> torch.Tensor:
    return uniform(views.keys, model.encoder.grid[0] * model.encoder.grid[1])


def encode_visible(model: MAE, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The encoder's output for the patches that it sees."""
    return model.encoder.encode(model.encoder.embed(x, order[:, : model.objective.n_visible]))


# --- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.6, 0.75, 0.95])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_the_loop_of_its_definition(ratio, channels, normalize):
    """Mean over masked patches of the mean squared error of pixels, ordered (row, col, channel)."""
    model = make(ratio, channels, normalize).double()
    views = batch(model)
    x, drawn = views.crops[0].double(), noise(model, views)
    with torch.no_grad():
        loss = model.objective.loss(model.encoder, x, drawn)
        prediction, mask = model.objective.predict(model.encoder, x, drawn)
    visible = int(24 * (1 - ratio))
    total, count = 0.0, 0
    for image in range(3):
        hidden = [i for _, i in sorted(zip(drawn[image].tolist(), range(24), strict=True))]
        hidden = hidden[visible:]
        assert mask[image].nonzero().flatten().tolist() == sorted(hidden)
        for patch in hidden:
            top, left = 4 * (patch // 6), 4 * (patch % 6)
            pixels = [
                float(x[image, c, top + row, left + col])
                for row in range(4)
                for col in range(4)
                for c in range(channels)
            ]
            if normalize:
                mean = sum(pixels) / len(pixels)
                variance = sum((p - mean) ** 2 for p in pixels) / (len(pixels) - 1)
                pixels = [(p - mean) / math.sqrt(variance + 1e-6) for p in pixels]
            guess = prediction[image, patch].tolist()
            total += sum((g - p) ** 2 for g, p in zip(guess, pixels, strict=True)) / len(pixels)
            count += 1
    assert count == 3 * (24 - visible)
    assert float(loss) == pytest.approx(total / count, rel=1e-9)


def test_the_loss_is_computed_in_float32_under_autocast():
    model = make()
    views = batch(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(views, 0)["loss"]
        prediction, _ = model.objective.predict(model.encoder, views.crops[0], noise(model, views))
    assert low.dtype == prediction.dtype == torch.float32
    with torch.no_grad():
        assert float(low) == pytest.approx(float(model(views, 0)["loss"]), rel=0.05)


def test_the_masked_patches_alone_are_the_target():
    """In the order in which they are predicted."""
    model = make(normalize=False)
    views = batch(model)
    drawn = noise(model, views)
    prediction, mask = model.objective.predict(model.encoder, views.crops[0], drawn)
    patches = model.encoder.patchify(views.crops[0])
    errors = (prediction - patches).square().mean(-1)
    expected = (errors * mask).sum() / mask.sum()
    torch.testing.assert_close(model.objective.loss(model.encoder, views.crops[0], drawn), expected)
    visible = model.encoder.patchify(views.crops[0]).gather(
        1, drawn.argsort(1)[:, : model.objective.n_visible, None].expand(-1, -1, patches.shape[-1])
    )
    seen = []
    model.objective.target = lambda x: seen.append(x) or x
    model.objective.loss(model.encoder, views.crops[0], drawn)
    both = torch.cat([visible, seen[0]], dim=1).sort(1).values
    assert torch.equal(both, patches.sort(1).values)


def test_masked_pixels_do_not_reach_the_encoder():
    model = make()
    views = batch(model)
    order = noise(model, views).argsort(1)
    hidden = torch.ones(3, 24, dtype=torch.bool).scatter(
        1, order[:, : model.objective.n_visible], False
    )
    pixels = hidden.view(3, 1, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    x = views.crops[0]
    latent = encode_visible(model, x, order)
    assert latent.shape == (3, 1 + 6, 48)
    assert torch.equal(encode_visible(model, torch.where(pixels, torch.nan, x), order), latent)


@pytest.mark.parametrize("registers", [0, 3])
def test_shuffled_decoding_is_restored_decoding(registers):
    """Tokens put back into image order first, with prefix and positions: the same predictions."""
    model = make(registers=registers)
    views = batch(model)
    order = noise(model, views).argsort(dim=1, stable=True)
    restore = order.argsort(1)
    prefix = 1 + registers
    decoder = model.objective.decoder
    with torch.no_grad():
        latent = encode_visible(model, views.crops[0], order)
        x = decoder.embed(latent)
        masks = decoder.mask_token.expand(3, 24 - model.objective.n_visible, -1)
        restored = take(torch.cat([x[:, prefix:], masks], 1), restore) + decoder.positions
        tokens = torch.cat([x[:, :prefix], restored], 1)
        for block in decoder.blocks:
            tokens = block(tokens)
        expected = decoder.predict(decoder.norm(tokens)[:, prefix:])
        found, _ = model.objective.predict(model.encoder, views.crops[0], noise(model, views))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "encoder", [{"registers": 2}, {"arch": "vit_base_patch16_siglip_224"}, {"layer_scale": 0.1}]
)
def test_other_encoders_learn(encoder):
    """Registers, no [CLS], layer scale: the loss is finite and reaches the patch projection."""
    model = make(**encoder)
    loss = model(batch(model), 0)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert model.encoder.vit.patch_embed.proj.weight.grad.abs().sum() > 0
    if model.encoder.vit.reg_token is not None:
        assert model.encoder.vit.reg_token.grad.abs().sum() > 0


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.75, 0.9])
def test_masks_hide_an_exact_number_per_image(ratio):
    """Their own patches in each image, every patch about equally often."""
    model = make(ratio)
    views = Views(
        [torch.zeros(200, 3, 16, 24)],
        torch.tensor([fold(i) for i in range(200)]),
        torch.zeros(200).long(),
    )
    with torch.no_grad():
        _, mask = model.objective.predict(model.encoder, views.crops[0], noise(model, views))
    hidden = 24 - int(24 * (1 - ratio))
    assert mask.sum(1).unique().tolist() == [hidden]
    assert len(mask.unique(dim=0)) > 20
    deviation = math.sqrt(hidden / 24 * (1 - hidden / 24) / 200)
    assert (mask.mean(0) - hidden / 24).abs().max() < 4.5 * deviation


def test_a_mask_follows_from_the_images_key_alone():
    """Not from its batch, its place in it, the step or the global generator."""
    model = make(seed=0)
    views = batch(model, 4)
    losses = []
    for rows in ([0], [1], [2], [3]):
        part = Views([views.crops[0][rows]], views.keys[rows], views.labels[rows])
        torch.manual_seed(len(losses))
        losses.append(float(model(part, len(losses))["loss"].detach()))
    moved = Views([views.crops[0]], views.keys.flip(0), views.labels)
    with torch.no_grad():
        assert float(model(views, 9)["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
        assert float(model(moved, 9)["loss"]) != pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, math.nan])
def test_a_ratio_outside_0_and_1_is_refused(ratio):
    with pytest.raises(UserError, match=r"--method.mask-ratio is"):
        MAEConfig(mask_ratio=ratio)


def test_a_ratio_that_leaves_nothing_is_refused():
    """24 patches: 0.97 would leave none visible, 1e-17 none masked; 0.95 and 0.01 are fine."""
    for ratio in (0.97, 1e-17):
        with pytest.raises(UserError, match=r"of 24 patches it leaves (0|24) visible"):
            make(ratio)
    assert make(0.95).objective.n_visible == 1
    assert make(0.01).objective.n_visible == 23


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_heads": 7}, "--method.decoder-heads is 7; it must divide .*512"),
        ({"decoder_depth": 0}, "--method.decoder-depth is 0"),
        ({"crop_scale": (0.5, 0.2)}, "--method.crop-scale"),
        ({"crop_scale": (0.0, 1.0)}, "--method.crop-scale"),
        ({"flip": 1.5}, "--method.flip is 1.5"),
    ],
)
def test_other_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        MAEConfig(**options)


# --- initialisation -----------------------------------------------------------------------------


def test_initialisation_is_the_originals():
    """Xavier-uniform bounds and variances, zero biases, unit norms, tokens of deviation 0.02."""
    model = make(width=192, heads=3, registers=4)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    projection = model.encoder.vit.patch_embed.proj
    maps = [(m.weight, m.bias) for m in linear]
    maps.append((projection.weight.flatten(1), projection.bias))
    assert len(maps) == 4 * (2 + 2) + 2 + 1
    for weight, bias in maps:
        # qkv too: one (3D, D) matrix, not three.
        bound = math.sqrt(6 / sum(weight.shape))
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.97 * bound
        assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert bias.abs().max() == 0
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 4 * 2 + 2
    for norm in norms:
        assert norm.eps == 1e-6
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
    vit = model.encoder.vit
    for token in (vit.cls_token, vit.reg_token, model.objective.decoder.mask_token):
        # Within four standard errors of the deviation of so many numbers.
        assert float(token.detach().std()) == pytest.approx(
            0.02, rel=4 / math.sqrt(2 * token.numel())
        )


def test_only_weight_matrices_decay():
    """As in the original: no bias, no norm; tokens are 3-D there, and do decay."""
    model = make(registers=2, layer_scale=0.1)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert "encoder.vit.pos_embed" not in trained
    for name, parameter in trained.items():
        wanted = parameter.ndim > 1 and not name.endswith("bias")
        assert model.decays(name, parameter) == wanted
    assert model.decays("encoder.vit.cls_token", trained["encoder.vit.cls_token"])
    assert not model.decays("x", trained["encoder.vit.blocks.0.ls1.gamma"])


# --- the method's place -------------------------------------------------------------------------


def test_the_method_is_found_by_its_file():
    assert find_method("mae") is MAE
    assert "mae" in method_names()
    assert "base" not in method_names()
    with pytest.raises(UserError, match=r"method is 'mea'.*nearest.*mae"):
        find_method("mea")


def test_views_are_one_crop_of_the_encoders_size():
    config = MAEConfig(crop_scale=(0.3, 0.9), flip=0.1)
    spec = MAE.views(config, make().encoder)
    (crop,) = spec.crops
    assert (crop.size, crop.scale, crop.flip, crop.count) == ((16, 24), (0.3, 0.9), 0.1, 1)


# --- pictures -----------------------------------------------------------------------------------


def cells(picture: np.ndarray, rows: int, size: tuple[int, int], zoom: int) -> np.ndarray:
    """The images of a sheet, (rows, 3, height, width, 3), at their own resolution."""
    h, w = size[0] * zoom, size[1] * zoom
    found = np.zeros((rows, 3, *size, 3), dtype=np.uint8)
    for row in range(rows):
        for column in range(3):
            top, left = 16 + row * (h + 4), 4 + column * (w + 4)
            found[row, column] = picture[top : top + h : zoom, left : left + w : zoom]
    return found


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_panels_show_what_they_say(normalize, channels, monkeypatch):
    """Original; masked patches gray; reconstruction with the visible patches pasted untouched."""
    captions = []
    drawn = figures.picture_rows
    monkeypatch.setattr(
        "ssl_vit.objectives.base.picture_rows",
        lambda columns, caption: (
            captions.append((list(columns), caption)),
            drawn(columns, caption),
        )[1],
    )
    model = make(channels=channels, normalize=normalize)
    scale = Normalize((0.4,) * channels, (0.2,) * channels)
    raw = torch.randint(0, 256, (3, channels, 16, 24), dtype=torch.uint8)
    views = batch(model)
    views = scale(Views([raw], views.keys, views.labels))
    picture = model.panels(views, scale)["reconstruction"]
    (titles, caption), zoom = captions[0], 96 // 16
    assert titles == ["original", "masked", "reconstruction"]
    assert caption.startswith("target: normalised" if normalize else "target: raw")
    assert ("true mean and std" in caption) == normalize
    assert picture.dtype == np.uint8
    assert picture.shape[1] == 3 * (24 * zoom + 4) + 4
    original, masked, reconstruction = cells(picture, 3, (16, 24), zoom).swapaxes(0, 1)
    shown = raw[:, :3] if channels >= 3 else raw[:, :1].expand(-1, 3, -1, -1)
    assert np.array_equal(original, shown.permute(0, 2, 3, 1).numpy())
    prediction, mask = model.objective.predict(model.encoder, views.crops[0], noise(model, views))
    hidden = mask.view(3, 4, 6).repeat_interleave(4, 1).repeat_interleave(4, 2).bool().numpy()
    assert (masked[hidden] == 128).all()
    assert np.array_equal(masked[~hidden], original[~hidden])
    assert np.array_equal(reconstruction[~hidden], original[~hidden])
    patches = model.encoder.patchify(views.crops[0])
    if normalize:
        deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        prediction = prediction * deviation + patches.mean(-1, keepdim=True)
    expected = scale.inverse(model.encoder.unpatchify(prediction.detach(), model.encoder.grid))
    expected = figures.to_rgb(expected)
    assert np.abs(reconstruction[hidden].astype(int) - expected[hidden].astype(int)).max() <= 1
    # Its own row by row: the images differ, and so do the patches hidden in them.
    assert not np.array_equal(hidden[0], hidden[1])


def test_a_picture_has_room_for_its_caption():
    """A long caption is wrapped below the images, never cut off on the right."""
    images = {"a": np.zeros((1, 8, 8, 3), np.uint8), "b": np.zeros((1, 8, 8, 3), np.uint8)}
    short = figures.picture_rows(images, "word")
    long = figures.picture_rows(images, "word " * 60)
    assert long.shape[1] == short.shape[1] == 2 * (96 + 4) + 4
    assert long.shape[0] > short.shape[0] + 5 * 16
    assert (long[:, -3:] == 255).all()
    dark = (long[-16 * 4 :].min(-1) < 128).any(1)
    assert dark.sum() > 20
    assert Image.fromarray(long).mode == "RGB"
