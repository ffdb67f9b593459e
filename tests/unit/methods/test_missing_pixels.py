"""Masked image modelling of images of which pixels are missing: these are never a target."""

import dataclasses

import pytest
import torch

from ssl_vit.common.seeds import uniform
from ssl_vit.common.task import Views
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods.base import Method
from ssl_vit.model.encoder import take
from ssl_vit.objectives.masked_patches import patch_statistics, visible_first
from tests.unit.methods import test_mae, test_simmim

MAKERS = {
    "mae": test_mae.make,
    "mae of pixels": lambda: test_mae.make(normalize=False),
    "simmim": test_simmim.make,
}
NAMES = pytest.mark.parametrize("name", MAKERS)


def made(name: str) -> tuple[Method, Views]:
    """A method of 24 patches of 4 pixels in 4 rows, float64, and three whole images."""
    module = test_simmim if name == "simmim" else test_mae
    model = MAKERS[name]().double()
    views = module.batch(model)
    return model, dataclasses.replace(views, crops=[views.crops[0].double()])


def holed(views: Views) -> Views:
    """The first image without its upper half and single pixels, and the second without a channel
    in some rows; missing pixels are 0, as after the device half."""
    missing = torch.zeros_like(views.crops[0], dtype=torch.bool)
    missing[0, :, :8] = True
    missing[0] |= torch.rand(missing.shape[1:], generator=torch.Generator().manual_seed(2)) < 0.3
    missing[1, 2, 4:12] = True
    missing[0, :, 12:] = True
    missing[0, 1, 13, 2::4] = False  # a value alone in each patch of the last row
    return dataclasses.replace(
        views, crops=[views.crops[0].masked_fill(missing, 0)], missing=[missing]
    )


def grads(model: Method, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


def masked_of(model: Method, views: Views, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions of all patches, and True where the encoder does not see them."""
    encoder, x = model.encoder, views.crops[0]
    valid = encoder.patchify(~views.missing[0])
    if name == "simmim":
        masked = views.drawn["masked"] | ~valid.any(2)
        return model.objective.predict(encoder, x, masked), masked
    noise = uniform(views.keys, 24)
    prediction, mask = model.objective.predict(encoder, x, noise, None, valid)
    return prediction, mask > 0


# --- the loss -----------------------------------------------------------------------------------


@NAMES
def test_the_loss_is_the_mean_over_valid_targets(name):
    """Against loops: mean and variance of a target are those of its patch's valid values."""
    model, views = made(name)
    views = holed(views)
    found = model(views, 0)["loss"]
    prediction, masked = masked_of(model, views, name)
    patches = model.encoder.patchify(views.crops[0])
    valid = model.encoder.patchify(~views.missing[0])
    errors = []
    for b, p in masked.nonzero().tolist():
        there = valid[b, p]
        target = patches[b, p][there]
        if name == "mae":
            if len(target) < 2:
                continue
            target = (target - target.mean()) / (target.var(correction=1) + 1e-6).sqrt()
        error = prediction[b, p][there] - target
        errors.append(error.abs() if name == "simmim" else error.square())
    assert 0 < len(torch.cat(errors)) < masked.sum() * 48
    torch.testing.assert_close(found, torch.cat(errors).mean())


@NAMES
def test_a_missing_pixel_has_no_gradient(name):
    """Nor does the prediction of a patch that has none, or of a value alone in its patch."""
    model, views = made(name)
    views = holed(views)
    objective, kept = model.objective, []
    head = objective.predict_pixels if name == "simmim" else objective.decoder.predict
    head.register_forward_hook(lambda _, __, out: kept.append(out) or out.retain_grad())
    loss = model(views, 0)["loss"]
    loss.backward()
    valid = model.encoder.patchify(~views.missing[0])
    if name == "simmim":
        gradient = kept[0].grad[:, model.encoder.vit.num_prefix_tokens :]
        gradient = kept[0].grad if gradient.shape[1] != 24 else gradient
        wanted = valid & (views.drawn["masked"] | ~valid.any(2))[:, :, None]
    else:
        order = visible_first(uniform(views.keys, 24), valid)[:, objective.n_visible :]
        gradient, wanted = kept[0].grad, take(valid, order)
        if name == "mae":
            wanted = wanted & (wanted.sum(-1, keepdim=True) > 1)
    assert torch.equal(gradient != 0, wanted)


@NAMES
def test_without_missing_pixels_loss_and_gradients_are_the_same_bits(name):
    """Those of the formula without a mask; where some say that nothing is missing, to rounding."""
    model, views = made(name)
    x, encoder, objective = views.crops[0], model.encoder, model.objective
    found = model(views, 0)["loss"]
    if name == "simmim":
        masked = views.drawn["masked"]
        error = (objective.predict(encoder, x, masked) - encoder.patchify(x)).abs()
        expected = (error.mean(2) * masked).sum() / masked.sum()
    else:
        order = uniform(views.keys, 24).argsort(dim=1, stable=True)
        tokens = objective.decode(encoder, x, order, objective.n_visible, masked_only=True)
        target = take(encoder.patchify(x), order[:, objective.n_visible :])
        if name == "mae":
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        expected = (objective.decoder.predict(tokens) - target).square().mean()
    assert torch.equal(found, expected)
    before = grads(model, expected)
    for key, value in grads(model, found).items():
        assert torch.equal(value, before[key]), key
    none = dataclasses.replace(views, missing=[torch.zeros_like(x, dtype=torch.bool)])
    again = model(none, 0)["loss"]
    torch.testing.assert_close(again, expected)
    for key, value in grads(model, again).items():
        torch.testing.assert_close(value, before[key])


@NAMES
def test_a_batch_without_any_data_has_the_loss_0(name):
    """And a gradient for every parameter, so that processes stay together: 0."""
    model, views = made(name)
    x = torch.zeros_like(views.crops[0])
    views = dataclasses.replace(views, crops=[x], missing=[torch.ones_like(x, dtype=torch.bool)])
    loss = model(views, 0)["loss"]
    assert loss.item() == 0
    for key, value in grads(model, loss).items():
        assert torch.equal(value, torch.zeros_like(value)), key


# --- what the encoder sees ----------------------------------------------------------------------


def test_patches_without_data_are_seen_last():
    """The order of the others is that of their noise."""
    noise = uniform(torch.arange(5), 24)
    valid = torch.rand(5, 24, 6, generator=torch.Generator().manual_seed(1)) < 0.2
    valid[0, 3:] = False  # too few for the six that are seen
    for b, order in enumerate(visible_first(noise, valid).tolist()):
        there = [p for p in order if valid[b, p].any()]
        assert order[: len(there)] == there
        assert there == [p for p in noise[b].argsort().tolist() if p in there]
        assert sorted(order) == list(range(24))
    assert torch.equal(visible_first(noise, None), noise.argsort(dim=1, stable=True))


@NAMES
def test_the_encoder_sees_no_patch_without_data_if_there_are_others(name, monkeypatch):
    """Whatever stands in such a patch, the loss is the same, to the bit."""
    model, views = made(name)
    views = holed(views)
    gone = ~model.encoder.patchify(~views.missing[0]).any(2)
    assert gone[0].sum() >= 12
    before = model(views, 0)["loss"]
    patches = model.encoder.patchify(views.crops[0])
    other = torch.where(gone[:, :, None], patches + 100, patches)
    x = model.encoder.unpatchify(other, model.encoder.grid)
    assert torch.equal(model(dataclasses.replace(views, crops=[x]), 0)["loss"], before)


def test_statistics_of_patches_are_those_of_valid_values():
    patches = torch.randn(2, 3, 8, dtype=torch.float64)
    valid = torch.rand(2, 3, 8) < 0.6
    valid[0, 0], valid[0, 1] = False, torch.arange(8) == 3
    mean, std = patch_statistics(patches, valid)
    for b in range(2):
        for p in range(3):
            there = patches[b, p][valid[b, p]]
            expected = there.mean() if len(there) else torch.zeros((), dtype=torch.float64)
            spread = there.var(correction=1) if len(there) > 1 else 0 * expected
            torch.testing.assert_close(mean[b, p, 0], expected)
            torch.testing.assert_close(std[b, p, 0], (spread + 1e-6).sqrt())
    everything = patch_statistics(patches, torch.ones_like(valid))
    for found, plain in zip(everything, patch_statistics(patches), strict=True):
        torch.testing.assert_close(found, plain)


# --- pictures -----------------------------------------------------------------------------------


@NAMES
def test_missing_pixels_are_gray_in_pictures(name):
    """In the original, and where the masked image shows it; others are themselves."""
    model, views = made(name)
    views, normalize = holed(views), Normalize((0.2,) * 3, (0.1,) * 3).double()
    x, missing = views.crops[0].clamp(-1, 1), views.missing[0].all(1)
    found = model.reconstruct(x, views.keys, normalize, missing=views.missing[0])
    whole = model.reconstruct(x, views.keys, normalize)
    original = torch.from_numpy(found.pictures["original"])
    assert (original[missing] == 128).all()
    assert (torch.from_numpy(whole.pictures["original"])[missing] == 51).all()  # 0.2 of 255
    there = ~views.missing[0].any(1)
    assert torch.equal(original[there], torch.from_numpy(whole.pictures["original"])[there])
    hidden = torch.from_numpy(found.pictures["masked"])
    assert (hidden[missing] == 128).all()
    panels = model.panels(dataclasses.replace(views, crops=[x]), normalize)
    assert panels["reconstruction"].shape[2] == 3
