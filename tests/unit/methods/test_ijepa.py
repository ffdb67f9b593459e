"""I-JEPA's objective, its teacher and what it refuses; parity and blocks are tested elsewhere."""

from dataclasses import replace

import pytest
import torch

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.seeds import fold
from ssl_vit.common.task import Views
from ssl_vit.methods.ijepa import IJEPA
from ssl_vit.model.execution import choose_attention
from ssl_vit.objectives.base import Setting
from ssl_vit.options.ijepa import IJEPAConfig

KINDS = {
    "without [CLS]": {"arch": "vit_base_patch16_gap_224"},
    "[CLS]": {"arch": "vit_tiny_patch16_224"},
    "[CLS] and registers": {"arch": "vit_tiny_patch16_224", "registers": 2},
    "rotary": {"arch": "vit_small_patch16_dinov3", "layer_scale": 1.0},
}
ALL = pytest.mark.parametrize("kind", KINDS)
TOOK = torch.tensor(True)


def make(kind: str = "without [CLS]", size: tuple[int, int] = (24, 32), **options) -> IJEPA:
    """48 patches; a teacher that is not the encoder; float64."""
    given = {"predictor_width": 16, "predictor_depth": 2, "predictor_heads": 2, **options}
    encoder = EncoderConfig(
        image_size=size,
        patch_size=4,
        width=48,
        depth=2,
        heads=4,
        positions="sincos",
        **KINDS[kind],
    )
    torch.manual_seed(0)
    model = IJEPA(IJEPAConfig(**given), encoder, 3).double().eval()
    choose_attention(model, torch.device("cpu"))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch(model: IJEPA, n: int = 3) -> Views:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, *model.encoder.image_size, generator=generator, dtype=torch.float64)
    keys = torch.tensor([fold(i) for i in range(n)])
    return Views([x], keys, torch.full((n,), -1), drawn=model.drawn(keys))


def changed(views: Views, **drawn) -> Views:
    return replace(views, drawn=views.drawn | drawn)


@ALL
@torch.no_grad()
def test_the_loss_is_the_loop_of_its_definition(kind):
    """Over images, target blocks, patches; each block is predicted on its own, without padding."""
    model = make(kind)
    views, objective = batch(model), model.objective
    encoder, teacher, errors = model.encoder, objective.teacher.encoder, []
    inside = views.drawn["inside"]
    assert not inside.all(), "this test needs padding"
    for i, image in enumerate(views.crops[0]):
        context = views.drawn["context"][i]
        seen = teacher(image[None]).patches[0]
        for block in views.drawn["targets"][i, :, inside]:
            latent = encoder.encode(encoder.embed(image[None], keep=context[None]))
            order = torch.cat([context, block])[None]
            tokens = objective.predictor(latent, order, encoder.vit.num_prefix_tokens)
            found = objective.predictor.predict(tokens[0, len(context) :])
            for prediction, place in zip(found, block, strict=True):
                target = seen[place]
                target = (target - target.mean()) / (target.var(correction=0) + 1e-5).sqrt()
                error = (prediction - target).abs()
                errors.append(torch.where(error < 1, error.square() / 2, error - 0.5).mean())
    torch.testing.assert_close(model(views, 0)["loss"], torch.stack(errors).mean())


def test_padding_is_not_seen():
    """Neither by what attends nor by the loss, whatever patches it lists."""
    model = make()
    views = batch(model)
    other = views.drawn["targets"].clone()
    other[:, :, ~views.drawn["inside"]] = 17
    found = []
    for given in (views, changed(views, targets=other)):
        loss = model(given, 0)["loss"]
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append([loss, *torch.autograd.grad(loss, trained)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    shown = changed(views, targets=other, inside=torch.ones_like(views.drawn["inside"]))
    assert not torch.isclose(model(shown, 0)["loss"], found[0][0])


@ALL
@torch.no_grad()
def test_predictions_are_of_the_context_alone(kind):
    """Other pixels elsewhere change the targets, and no prediction; in the context they do."""
    model = make(kind)
    views, encoder = batch(model), model.encoder
    context, targets, inside = (views.drawn[n] for n in ("context", "targets", "inside"))
    x = encoder.patchify(views.crops[0])
    seen = torch.zeros_like(x[..., :1]).scatter(1, context[..., None], 1)

    def found(patches: torch.Tensor) -> torch.Tensor:
        images = encoder.unpatchify(patches, encoder.grid)
        return model.objective.predict(encoder, images, context, targets, inside)[:, :, inside]

    before = found(x)
    assert torch.equal(found(x + 3 * (1 - seen)), before)
    assert not torch.isclose(found(x + 3 * seen), before).any(-1).all()


@pytest.mark.parametrize("kind", ["[CLS]", "[CLS] and registers"])
def test_tokens_beside_the_patches_go_along(kind):
    """They are trained, though no target is of them."""
    model = make(kind)
    model(batch(model), 0)["loss"].backward()
    assert model.encoder.vit.cls_token.grad.abs().max() > 0


def test_the_teacher_gets_no_gradient_and_is_what_is_saved():
    model = make()
    model(batch(model), 0)["loss"].backward()
    assert model.exported_encoder() is model.objective.teacher.encoder
    assert all(p.grad is None for p in model.exported_encoder().parameters())


def test_momentum_rises_to_1_in_a_line():
    objective = make(momentum=0.9).objective
    objective.set_length(10, 5)
    assert [objective.momentum(step) for step in range(11)] == pytest.approx(
        [0.9 + 0.01 * step for step in range(11)]
    )


def test_the_teacher_moves_after_a_step_that_was_taken():
    model = make(momentum=0.75)
    model.objective.set_length(10, 5)
    name = "blocks.0.mlp.fc1.weight"
    own, teacher = (e.vit.get_parameter(name) for e in (model.encoder, model.exported_encoder()))
    before = teacher.clone()
    model.after_update(2, torch.tensor(False))
    assert torch.equal(teacher, before)
    model.after_update(2, TOOK)
    torch.testing.assert_close(teacher, 0.8 * before + 0.2 * own.detach())


def test_targets_without_data_do_not_count():
    """Nor is a patch of which a part is missing left out."""
    model = make()
    views = batch(model)
    missing = torch.zeros_like(views.crops[0], dtype=torch.bool)
    missing[:, :, :12, :16] = True  # 3 x 4 patches
    missing[:, :, 14, :] = True
    seen = model.objective._weights(model.encoder, replace(views, missing=[missing]))
    row, col = views.drawn["targets"] // 8, views.drawn["targets"] % 8
    empty = (row < 3) & (col < 4)
    assert torch.equal(seen == 1, views.drawn["inside"] & ~empty)
    assert (seen == 0)[:, :, views.drawn["inside"]].any(), "this test needs such targets"


def test_a_collapse_is_named():
    """Where all targets are alike, but for their places; not of a few images, which may be so."""
    model = make()
    with torch.no_grad():
        model.exported_encoder().vit.patch_embed.proj.weight.zero_()
    for images, expected in ((8, ["collapse"]), (4, [])):
        means = {name: value.item() for name, value in model(batch(model, images), 0).items()}
        assert means["target_spread"] < 1e-6
        assert list(model.concerns(means)) == expected
    sound = make()
    means = {name: value.item() for name, value in sound(batch(sound, 8), 0).items()}
    assert 0.1 < means["target_spread"] < 1
    assert sound.concerns(means) == {}


def test_a_small_context_is_advised_against():
    setting = Setting(images=1000, batch_size=8, parts=1)
    assert make().advice(setting) == []
    (line,) = make(size=(16, 16)).advice(setting)
    assert "sees 2 of 16 patches" in line


def test_the_mask_token_decays():
    model = make()
    name = "objectives.ijepa.predictor.mask_token"
    assert model.decays(name, model.get_parameter(name))


def test_heads_of_the_predictor_are_the_encoders_unless_given():
    for given, heads in ((0, 4), (2, 2)):
        assert make(predictor_heads=given).objective.predictor.blocks[0].attn.num_heads == heads


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"predictor_heads": 3}, "--method.predictor-heads is 3; it must divide"),
        ({"predictor_width": 20, "predictor_heads": 0}, ""),
        ({"predictor_width": 18}, "--method.predictor-width is 18; sine-cosine"),
        ({"target_scale": (0.9, 1.0)}, "nothing of the context in a grid of 6x8 patches: lower "),
        ({"target_aspect": (0.0, 1.0)}, "--method.target-aspect is 0 1"),
        ({"targets": 0}, "--method.targets is 0; it must be 1 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    if not said:
        make(**options)
        return
    with pytest.raises(UserError, match=said):
        make(**options)
