"""MAE and DINO on one encoder: their sum is that of the two alone, and each keeps what is its."""

import dataclasses
from typing import NamedTuple

import pytest
import torch

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.seeds import fold, fold_keys
from ssl_vit.common.task import Views
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods.dino import DINO
from ssl_vit.methods.mae import MAE
from ssl_vit.methods.mae_dino import MAEDINO
from ssl_vit.model.execution import choose_attention
from ssl_vit.options.dino import DINOConfig
from ssl_vit.options.mae import MAEConfig
from ssl_vit.options.mae_dino import DINOPart, MAEDINOConfig, MAEPart
from ssl_vit.pretrain import parse_options

ENCODER = EncoderConfig(
    "vit_tiny_patch16_224", image_size=(16,), patch_size=4, width=32, depth=2, heads=2
)
OF_MAE = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.6}
OF_DINO = {"prototypes": 32, "head_width": 16, "bottleneck": 8, "local_crops": 3}
OF_DINO |= {"local_size": (8,), "momentum": 0.75, "center_momentum": 0.6, "teacher_temp": 0.2}
CPU = torch.device("cpu")


def both(**weights: float) -> MAEDINO:
    config = MAEDINOConfig(mae=MAEPart(**OF_MAE), dino=DINOPart(**OF_DINO), **weights)
    torch.manual_seed(0)
    method = MAEDINO(config, ENCODER, 3).double()
    choose_attention(method, CPU)
    # Student and teacher differ, and the centre is somewhere.
    with torch.no_grad():
        for parameter in (*method.encoder.parameters(), *method.objectives["dino"].parameters()):
            parameter.add_(0.02 * torch.randn_like(parameter))
        method.objectives["dino"].center.value.normal_()
    return method


def batch(n: int = 4) -> Views:
    """MAE's crop, DINO's two global ones, and its local ones, all different."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(n, 3, 16, 16)] * 3 + [(n * 3, 3, 8, 8)]
    crops = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    keys = torch.tensor([fold(7, i) for i in range(n)])
    return Views(crops, keys, torch.full((n,), -1), key=11)


class Alone(NamedTuple):
    """Separate methods with the same weights."""

    mae: MAE
    dino: DINO


def alone(method: MAEDINO) -> Alone:
    made = Alone(MAE(MAEConfig(**OF_MAE), ENCODER, 3), DINO(DINOConfig(**OF_DINO), ENCODER, 3))
    for name, own in made._asdict().items():
        own.double().train()
        choose_attention(own, CPU)
        wanted = ("encoder.", f"objectives.{name}.")
        state = {k: v.clone() for k, v in method.state_dict().items() if k.startswith(wanted)}
        own.load_state_dict(state, strict=True)
    return made


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def same(one: torch.Tensor, two: torch.Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


# --- the sum ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mae_weight", "dino_weight"), [(1.0, 1.0), (0.3, 2.0)])
def test_loss_and_gradients_are_the_sum_of_the_two_alone(mae_weight, dino_weight):
    """On the same crops; DINO draws nothing, MAE its masks from the batch's own keys."""
    method, views = both(mae_weight=mae_weight, dino_weight=dino_weight), batch()
    mae, dino = alone(method)
    found = method(views, 0)
    of_mae = mae(Views(views.crops[:1], views.keys, views.labels), 0)
    of_dino = dino(Views(views.crops[1:], views.keys, views.labels), 0)
    total = mae_weight * of_mae["loss"] + dino_weight * of_dino["loss"]
    same(found["loss"], total)
    parts = {f"mae_{k}": v for k, v in of_mae.items()}
    parts |= {f"dino_{k}": v for k, v in of_dino.items()}
    assert found.keys() == {"loss", *parts} == MAEDINO.explained.keys()
    for name, value in parts.items():
        same(found[name], value)
    found["loss"].backward()
    total.backward()
    ours, expected = gradients(method), {}
    for own in (mae, dino):
        for name, value in gradients(own).items():
            expected[name] = expected.get(name, 0) + value
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        same(ours[name], value)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"mae_weight": 0.0}, "--method.mae-weight is 0; it must be above 0 (pretrain dino is"),
        ({"dino_weight": -1.0}, "--method.dino-weight is -1; it must be above 0 (pretrain mae is"),
        ({"dino_weight": float("nan")}, "--method.dino-weight is nan; it must be above 0"),
    ],
)  # fmt: skip
def test_weights_that_make_no_sense_are_refused(weights, said):
    with pytest.raises(UserError) as refusal:
        MAEDINOConfig(**weights)
    assert str(refusal.value).startswith(said)


# --- crops and keys -----------------------------------------------------------------------------


def test_views_are_those_of_both():
    """First MAE's crop, with its augmentation, then DINO's, with theirs."""
    method = both()
    c, encoder = method.config, method.encoder
    mae, dino = MAE.views(c.mae, encoder).crops, DINO.views(c.dino, encoder).crops
    assert MAEDINO.views(c, encoder).crops == (*mae, *dino)
    assert mae[0] not in dino


def test_each_objective_has_its_own_crops_and_keys():
    """What one draws says nothing of what the other does."""
    method, views = both(), batch()
    mae, dino = method.seen_by("mae", views), method.seen_by("dino", views)
    for part, crops in ((mae, views.crops[:1]), (dino, views.crops[1:])):
        assert len(part.crops) == len(crops)
        assert all(a is b for a, b in zip(part.crops, crops, strict=True))
        assert torch.equal(part.labels, views.labels)
    assert torch.equal(mae.keys, views.keys)
    assert torch.equal(dino.keys, fold_keys(views.keys, 1))
    assert not set(mae.keys.tolist()) & set(dino.keys.tolist())
    assert mae.key != dino.key


# --- what DINO needs ----------------------------------------------------------------------------


def test_the_teacher_is_exported():
    method = both()
    assert method.exported_encoder() is method.objectives["dino"].teacher.encoder
    state, student = method.exported_encoder().state_dict(), method.encoder.state_dict()
    assert any(not torch.equal(state[name], student[name]) for name in state)
    assert not any(p.requires_grad for p in method.exported_encoder().parameters())


def test_a_new_one_starts_with_teacher_and_student_equal():
    """Also where the encoder begins with given weights."""
    torch.manual_seed(0)
    config = MAEDINOConfig(mae=MAEPart(**OF_MAE), dino=DINOPart(**OF_DINO))
    method = MAEDINO(config, ENCODER, 3)
    teacher = method.objectives["dino"].teacher
    given = {k: torch.randn_like(v) for k, v in method.encoder.vit.state_dict().items()}
    for _ in range(2):
        for one, other in ((teacher.encoder, method.encoder),
                           (teacher.head, method.objectives["dino"].head)):  # fmt: skip
            state = one.state_dict()
            assert all(torch.equal(state[k], v) for k, v in other.state_dict().items())
        method.begin_with(given, "given")
    assert torch.equal(method.encoder.vit.state_dict()["cls_token"], given["cls_token"])


@pytest.mark.parametrize("took", [True, False])
def test_centre_and_teacher_move_as_dinos(took):
    """After a step of the same student; not where the step was skipped."""
    method, views = both(), batch()
    dino = alone(method).dino
    first = {k: v.clone() for k, v in method.state_dict().items()}
    method(views, 0)
    dino(Views(views.crops[1:], views.keys, views.labels), 0)
    with torch.no_grad():
        for own in (method, dino):
            torch.manual_seed(3)
            for p in (*own.encoder.parameters(), *own.objectives["dino"].head.parameters()):
                p.add_(torch.randn_like(p))
    for own in (method, dino):
        own.set_length(10, 5)
        own.after_update(2, torch.tensor(took))
    found = method.state_dict()
    for name, value in dino.state_dict().items():
        same(found[name], value)
    moves = ("teacher.encoder.vit.cls_token", "teacher.head.mlp.0.weight", "center.value")
    for name in (f"objectives.dino.{n}" for n in moves):
        assert torch.equal(found[name], first[name]) == (not took), name


def test_the_last_layer_is_frozen_at_first():
    method, views = both(), batch()
    method.set_length(10, 5)  # freeze_last_layer is 1ep
    last = method.objectives["dino"].head.last_layer.weight_v
    for step in (4, 5):
        method.zero_grad()
        method(views, step)["loss"].backward()
        method.before_update(step)
        assert (last.grad is None) == (step == 4)
        assert method.objectives["mae"].decoder.mask_token.grad is not None


def test_concerns_are_dinos_with_its_own_flags():
    method = both()
    method.objectives["dino"].images = 64
    fine = {"loss": 1.0, "mae_loss": 0.5, "dino_teacher_entropy_share": 0.5}
    fine |= {"dino_prototypes_used": 20.0}
    assert method.concerns(fine) == {}
    uniform = method.concerns(fine | {"dino_teacher_entropy_share": 0.999})
    assert list(uniform) == ["uniform output"]
    assert "a lower --method.dino.teacher-temp," in uniform["uniform output"]
    one = method.concerns(fine | {"dino_prototypes_used": 1.0})
    assert list(one) == ["one prototype"]
    for option in ("center-momentum", "teacher-temp", "norm-last-layer"):
        assert f"--method.dino.{option}" in one["one prototype"]
    assert "--method.teacher-temp" not in str(uniform | one)


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--method.mae.mask-ratio", "2"),
         "--method.mae.mask-ratio is 2; it must lie between 0 and 1"),
        (("--method.dino.teacher-temp", "0"),
         "--method.dino.teacher-temp is 0; it must be above 0"),
        (("--method.mae.decoder-heads", "7", "--method.mae.decoder-width", "32"),
         "--method.mae.decoder-heads is 7; it must divide --method.mae.decoder-width, 32"),
    ],
)  # fmt: skip
def test_an_options_part_is_named_where_it_is_refused(flags, said):
    with pytest.raises(UserError) as refusal:
        parse_options(["mae_dino", "--config", "mae_dino_digits", *flags])
    assert str(refusal.value) == f"command line: {said}"


def test_options_go_to_their_part():
    flags = ("--method.mae.flip", "0.25", "--method.dino.flip", "0.75", "--method.mae-weight", "3")
    config = parse_options(["mae_dino", "--config", "mae_dino_digits", *flags])[1].method
    assert (config.mae.flip, config.dino.flip, config.mae_weight) == (0.25, 0.75, 3.0)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("mae", {"mask_ratio": 0.99}, "--method.mae.mask-ratio is 0.99; of 16 patches"),
        ("dino", {"local_size": (6,)}, "--method.dino.local-size is 6x6; the patch size, 4"),
    ],
)
def test_what_does_not_fit_the_encoder_is_refused(part, change, said):
    parts = {"mae": MAEPart(**OF_MAE), "dino": DINOPart(**OF_DINO)}
    parts[part] = dataclasses.replace(parts[part], **change)
    with pytest.raises(UserError) as refusal:
        MAEDINO(MAEDINOConfig(**parts), ENCODER, 3)
    assert str(refusal.value).startswith(said)
    assert "\n" not in str(refusal.value)


# --- pictures -----------------------------------------------------------------------------------


def test_pictures_of_both():
    """Reconstructions by the student, whom the decoder knows, and the teacher's attention."""
    method, views = both(), batch()
    scale = Normalize((0.4,) * 3, (0.2,) * 3)
    assert list(method.eval().panels(views, scale)) == ["reconstruction", "attention"]
    mae = alone(method).mae.eval()
    ours = method.reconstruct(views.crops[0], views.keys, scale)
    theirs = mae.reconstruct(views.crops[0], views.keys, scale)
    assert ours.caption == theirs.caption
    for name, pictures in theirs.pictures.items():
        assert (ours.pictures[name] == pictures).all()
