"""SimMIM's objective, masks and pictures; parity is tested elsewhere."""

import numpy as np
import pytest
import torch

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.seeds import fold
from ssl_vit.common.task import Views
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods.simmim import SimMIM
from ssl_vit.model.execution import choose_attention
from ssl_vit.options.simmim import SimMIMConfig


def make(channels: int = 3, size: tuple[int, int] = (16, 24), **options) -> SimMIM:
    """24 patches, of which 6 units; 4 of these are masked."""
    encoder = EncoderConfig(
        "vit_tiny_patch16_224", image_size=size, patch_size=4, width=48, depth=2, heads=4
    )
    torch.manual_seed(0)
    model = SimMIM(SimMIMConfig(**options), encoder, channels).eval()
    choose_attention(model, torch.device("cpu"))
    return model


def batch(model: SimMIM, n: int = 3) -> Views:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, model.encoder.channels, *model.encoder.image_size, generator=generator)
    keys = torch.tensor([fold(i) for i in range(n)])
    return Views([x], keys, torch.full((n,), -1), drawn=model.drawn(keys))


# --- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_the_loop_of_its_definition(channels):
    """Mean absolute error of all pixels of masked patches, ordered (row, column, channel)."""
    model = make(channels)
    views = batch(model)
    x, masked = views.crops[0], views.drawn["masked"]
    with torch.no_grad():
        found = model(views, 0)["loss"]
        prediction = model.objective.predict(model.encoder, x, masked)
    errors = []
    for b, patch in masked.nonzero().tolist():
        top, left = 4 * (patch // 6), 4 * (patch % 6)
        true = x[b, :, top : top + 4, left : left + 4].permute(1, 2, 0).flatten()
        errors.append((prediction[b, patch] - true).abs())
    assert len(errors) == 3 * 16
    torch.testing.assert_close(found, torch.cat(errors).mean())


def test_visible_patches_are_not_in_the_loss(monkeypatch):
    """Another prediction there changes nothing, and gets no gradient; in a masked one it does."""
    model = make()
    views = batch(model)
    x, masked = views.crops[0], views.drawn["masked"]
    whole = model.objective.predict(model.encoder, x, masked).detach()

    def loss(prediction: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(model.objective, "predict", lambda *_: prediction)
        return model.objective.loss(model.encoder, x, masked)

    before = loss(whole)
    assert torch.equal(loss(torch.where(masked[:, :, None], whole, whole + 100)), before)
    prediction = whole.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(prediction), prediction)
    assert torch.equal(gradient.abs().sum(2) > 0, masked)
    assert gradient[masked].abs().unique().numel() == 1, "all masked pixels weigh the same"


def test_masked_pixels_do_not_reach_the_encoder():
    """What is predicted does not depend on them; it does on the visible ones."""
    model = make()
    views = batch(model)
    x, masked = views.crops[0], views.drawn["masked"]
    patches = model.encoder.patchify(x)

    def predicted(where: torch.Tensor) -> torch.Tensor:
        changed = torch.where(where[:, :, None], patches + 1 + patches.flip(2), patches)
        images = model.encoder.unpatchify(changed, model.encoder.grid)
        with torch.no_grad():
            return model.objective.predict(model.encoder, images, masked)

    first = predicted(torch.zeros_like(masked))
    assert torch.equal(predicted(masked), first)
    assert not torch.allclose(predicted(~masked), first, atol=1e-3)


def test_the_mask_token_stands_where_a_patch_is_masked_only():
    """Before positions are added, which masked patches get like others."""
    model = make()
    views = batch(model)
    x, masked = views.crops[0], views.drawn["masked"]
    token = torch.randn(48)
    with torch.no_grad():
        plain = model.encoder.embed(x).values
        found = model.encoder.embed(x, masked=masked, token=token).values
        positions = model.encoder.positions(model.encoder.grid)[1].expand_as(found)
    assert torch.equal(found[~masked], plain[~masked])
    assert torch.equal(found[masked], (token + positions)[masked])
    # It learns from the masked patches' places alone.
    loss = model(views, 0)["loss"]
    loss.backward()
    assert model.objective.mask_token.grad.abs().max() > 0
    nothing = torch.zeros_like(masked)
    model.zero_grad()
    model.objective.predict(model.encoder, x, nothing).sum().backward()
    assert model.objective.mask_token.grad.abs().max() == 0


# --- masks --------------------------------------------------------------------------------------


def test_workers_draw_units_of_the_grid():
    model = make()
    spec = SimMIM.view_spec(model.config, model.encoder)
    assert [c.size for c in spec.crops] == [(16, 24)]
    masked = batch(model, 8).drawn["masked"]
    assert (masked.shape, masked.dtype) == ((8, 24), torch.bool)
    units = masked.view(8, 2, 2, 3, 2).transpose(2, 3).flatten(3)
    assert torch.equal(units.all(3), units.any(3))
    assert units.all(3).sum((1, 2)).tolist() == [4] * 8
    assert len({tuple(row) for row in masked.tolist()}) > 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask_unit": 3},
         "--method.mask-unit is 3; it must divide the grid of 4x6 patches"),
        ({"mask_unit": 4},
         "--method.mask-unit is 4; it must divide the grid of 4x6 patches"),
        ({"mask_ratio": 0.9},
         "--method.mask-ratio is 0.9; of 6 units of 2x2 patches it leaves none visible: lower it, "
         "or --method.mask-unit"),
        ({"mask_unit": 4, "size": (16, 16)},
         "--method.mask-ratio is 0.6; of 1 units of 4x4 patches it leaves none visible: lower it, "
         "or --method.mask-unit"),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit_the_grid_are_refused(options, said):
    with pytest.raises(UserError) as refusal:
        make(**options)
    assert str(refusal.value) == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask_ratio": 0.0}, "--method.mask-ratio is 0; it must lie between 0 and 1"),
        ({"mask_ratio": 1.0}, "--method.mask-ratio is 1; it must lie between 0 and 1"),
        ({"mask_unit": 0}, "--method.mask-unit is 0; it must be 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(UserError) as refusal:
        SimMIMConfig(**options)
    assert str(refusal.value) == said


# --- pictures -----------------------------------------------------------------------------------

SCALE = Normalize((0.4,) * 3, (0.2,) * 3)


@pytest.mark.parametrize(("ratio", "units"), [(0.0, 4), (0.3, 2), (0.8, 5)])
def test_reconstruction_by_any_ratio(ratio, units):
    """Gray where it is masked; visible patches as they are, masked ones as predicted."""
    model = make()
    views = batch(model)
    found = model.reconstruct(views.crops[0], views.keys, SCALE, ratio)
    assert f"target: raw pixels. {4 * units} of 24 patches are masked." in found.caption
    original, masked, prediction, reconstruction = (
        found.pictures[n] for n in ("original", "masked", "prediction", "reconstruction")
    )
    hidden = (masked == 128).all(-1) & (original != 128).any(-1)
    assert (hidden.sum((1, 2)) == 4 * units * 16).all()
    assert np.array_equal(reconstruction[~hidden], original[~hidden])
    assert np.array_equal(reconstruction[hidden], prediction[hidden])
    assert not np.array_equal(reconstruction[hidden], original[hidden])


def test_a_ratio_or_target_that_it_cannot_show_is_refused():
    """By the options of the command that asks."""
    model = make()
    views = batch(model)
    x, keys = views.crops[0], views.keys
    with pytest.raises(UserError) as refusal:
        model.reconstruct(x, keys, SCALE, target="normalized")
    assert str(refusal.value) == "--target is normalized; SimMIM predicts pixels"
    assert model.reconstruct(x, keys, SCALE, target="pixels").pictures
    with pytest.raises(UserError) as refusal:
        model.reconstruct(x, keys, SCALE, mask_ratio=0.9)
    said = "--mask-ratio is 0.9; of 6 units of 2x2 patches it leaves none visible: lower it"
    assert str(refusal.value) == said


def test_panels_are_those_of_the_keys():
    """In training masks are drawn in workers, here from the keys of the images: equally."""
    model = make()
    views = batch(model)
    first = model.panels(views, SCALE)
    assert list(first) == ["reconstruction"]
    again = Views([views.crops[0]], views.keys, views.labels)
    torch.manual_seed(5)
    assert np.array_equal(model.panels(again, SCALE)["reconstruction"], first["reconstruction"])
    other = model.panels(again.redrawn(1), SCALE)["reconstruction"]
    assert not np.array_equal(other, first["reconstruction"])
