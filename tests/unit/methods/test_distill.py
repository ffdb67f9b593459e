"""Distillation: what is compared with what, and whose features they are."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.task import Views
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods.distill import Distill, feature_loss
from ssl_vit.model.encoder import Encoder
from ssl_vit.options.distill import DistillConfig
from ssl_vit.weights.exchange import EncoderInfo, save_encoder

STUDENT = EncoderConfig(
    "vit_tiny_patch16_224", image_size=(16,), patch_size=4, width=24, depth=1, heads=2
)
TEACHER = EncoderConfig(
    "vit_tiny_patch16_224", image_size=(24,), patch_size=8, width=32, depth=2, heads=2
)
MEAN, STD = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)
BATCH = 5


def saved(folder: Path, channels: int = 3) -> tuple[str, Encoder]:
    torch.manual_seed(3)
    encoder = Encoder(TEACHER, channels)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = folder / f"teacher-{channels}.safetensors"
    save_encoder(path, encoder, EncoderInfo(TEACHER, channels, MEAN[:channels], STD[:channels]))
    return str(path), encoder.eval()


def make(teacher: str, channels: int = 3, **changed) -> Distill:
    torch.manual_seed(0)
    return Distill(DistillConfig(teacher=teacher, **changed), STUDENT, channels).train()


def images(size: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(BATCH, channels, size, size, generator=torch.Generator().manual_seed(1))


def views(crop: torch.Tensor, missing: torch.Tensor | None = None) -> Views:
    labels = torch.full((BATCH,), -1)
    return Views([crop], torch.arange(BATCH), labels, missing=[] if missing is None else [missing])


@pytest.mark.parametrize("kind", ["cosine", "mse", "smooth_l1"])
def test_losses_are_loops(kind):
    found, wanted = torch.randn(2, 3, 6), 4 * torch.randn(2, 3, 6) + 1
    for i in range(2):
        for j in range(3):
            x, y = found[i, j], wanted[i, j]
            if kind == "cosine":
                expected = 1 - (x @ y) / (x.norm() * y.norm())
            else:
                y = (y - y.mean()) / (y.var(unbiased=False) + 1e-5).sqrt()
                d = (x - y).abs()
                each = d**2 if kind == "mse" else torch.where(d < 1, d**2 / 2, d - 0.5)
                expected = each.mean()
            torch.testing.assert_close(feature_loss(found, wanted, kind)[i, j], expected)


@pytest.mark.parametrize("given", [(), (32,)])
def test_the_teacher_sees_what_it_was_trained_on(given, tmp_path):
    """At its own size, by its own statistics: the loss is that of its features of the images
    themselves, resized to the student's grid."""
    name, teacher = saved(tmp_path)
    method = make(name, teacher_size=given, loss="mse", cls_weight=0.5, patch_weight=2.0)
    method.set_statistics((0.1, 0.0, 0.7), (0.3, 1.0, 0.2))
    size = given[0] if given else 16
    spec = method.view_spec(method.config, method.encoder)
    assert [crop.size for crop in spec.crops] == [(size, size)]
    shown = images(size)
    found = method(views(Normalize((0.1, 0.0, 0.7), (0.3, 1.0, 0.2)).images(shown)), 0)
    with torch.no_grad():
        wanted = teacher(Normalize(MEAN, STD).images(shown))
        seen = method.encoder(
            F.interpolate(
                Normalize((0.1, 0.0, 0.7), (0.3, 1.0, 0.2)).images(shown),
                (16, 16),
                mode="bicubic",
                antialias=True,
            )
        )
        objective = method.objective
        cls = feature_loss(objective.cls_head(seen.cls), wanted.cls, "mse").mean()
        maps = wanted.patches.unflatten(1, wanted.grid).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, (4, 4), mode="bicubic").flatten(2).mT
        patch = feature_loss(objective.patch_head(seen.patches), maps, "mse").mean()
    torch.testing.assert_close(found["cls_loss"], cls, rtol=1e-3, atol=0)
    torch.testing.assert_close(found["patch_loss"], patch, rtol=1e-3, atol=0)
    torch.testing.assert_close(found["loss"].detach(), 0.5 * cls + 2 * patch, rtol=1e-3, atol=0)


def test_the_teacher_neither_learns_nor_is_saved(tmp_path):
    """Its weights stay; they are in no state, and are opened again; all others are in it."""
    name, teacher = saved(tmp_path)
    method = make(name)
    method(views(images(16)), 0)["loss"].backward()
    frozen = method.objective.teacher.encoder
    assert not frozen.training
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    trained = [p for n, p in method.named_parameters() if ".teacher." not in n]
    assert all(p.grad is not None for p in trained if p.requires_grad)
    state = method.state_dict()
    assert not [key for key in state if "teacher" in key]
    other = make(name)
    torch.nn.init.ones_(other.encoder.vit.norm.weight.data.fill_(3.0))
    other.load_state_dict(state, strict=True)
    for (key, a), (_, b) in zip(method.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), key
    for key, value in teacher.vit.state_dict().items():
        if key != "pos_embed":
            assert torch.equal(frozen.vit.state_dict()[key], value), key
    state.pop("encoder.vit.cls_token")
    with pytest.raises(RuntimeError, match=r"encoder\.vit\.cls_token"):
        other.load_state_dict(state, strict=True)


def test_patches_without_data_do_not_count(tmp_path):
    method = make(saved(tmp_path)[0], cls_weight=0.0)
    crop = images(16)
    missing = torch.zeros_like(crop, dtype=torch.bool)
    missing[:, :, :, 8:] = True
    crop = crop.masked_fill(missing, 0)
    found = method(views(crop, missing), 0)["patch_loss"]
    with torch.no_grad():
        wanted, seen = method.objective.teacher.encoder(crop), method.encoder(crop)
        maps = wanted.patches.unflatten(1, wanted.grid).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, (4, 4), mode="bicubic").flatten(2).mT
        each = feature_loss(method.objective.patch_head(seen.patches), maps, method.config.loss)
    torch.testing.assert_close(found, each.unflatten(1, (4, 4))[:, :, :2].mean())


def test_a_teacher_of_other_channels_is_adapted(tmp_path, caplog):
    """Five channels for three: its filters are spread, and that is said."""
    caplog.set_level("INFO")
    method = make(saved(tmp_path)[0], channels=5)
    method.set_statistics((0.1,) * 5, (0.2,) * 5)
    assert method(views(images(16, 5)), 0)["loss"].isfinite()
    assert "channels" in caplog.text


def test_a_file_of_timm_teaches(tmp_path):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3
    )
    path = tmp_path / "timm.pth"
    torch.save(model.state_dict(), path)
    method = make(str(path))
    shown = images(16)
    with torch.no_grad():
        expected = model.eval().forward_features(F.interpolate(shown, (32, 32)))
    assert expected.shape[-1] == method.objective.cls_head.out_features
    assert method(views(shown), 0)["loss"].isfinite()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"teacher": ""}, "--method.teacher is empty; give a run folder or a weight file"),
        ({"teacher": "none.pth"}, "--method.teacher is 'none.pth'; no such file, nor a folder"),
        ({"teacher_size": (20,)}, "--method.teacher-size is 20x20; the teacher's patch size, 8,"),
        ({"cls_weight": 0.0, "patch_weight": 0.0}, "--method.cls-weight and --method.patch-weight"),
    ],
)
def test_what_cannot_be_is_refused(changed, said, tmp_path):
    with pytest.raises(UserError) as error:
        make(**({"teacher": saved(tmp_path)[0]} | changed))
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_a_student_has_to_have_cls(tmp_path):
    config = replace(STUDENT, arch="vit_base_patch16_siglip_224")
    with pytest.raises(UserError, match="which it lacks"):
        Distill(DistillConfig(teacher=saved(tmp_path)[0]), config, 3)
