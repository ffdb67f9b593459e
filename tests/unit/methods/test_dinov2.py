"""DINOv2 apart from its recorded step: schedules, freezing, missing patches, what it says."""

from dataclasses import replace

import pytest
import torch

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.task import Views
from ssl_vit.data.order import Places
from ssl_vit.methods.dinov2 import DINOv2
from ssl_vit.objectives.base import Setting
from ssl_vit.options.dinov2 import DINOv2Config

ENCODER = EncoderConfig(
    "vit_tiny_patch16_224", image_size=(16,), patch_size=4, width=24, depth=2, heads=2
)
SMALL = DINOv2Config(prototypes=12, head_width=16, bottleneck=8, local_crops=2)
BATCH = 6


def make(**changed) -> DINOv2:
    torch.manual_seed(0)
    return DINOv2(replace(SMALL, **changed), ENCODER, 1).train()


def views(method: DINOv2, key: int = 1) -> Views:
    """Two global crops and two local ones of noise, with masks."""
    random = torch.Generator().manual_seed(key)
    crops = [torch.randn(BATCH, 1, 16, 16, generator=random) for _ in range(2)]
    crops.append(torch.randn(2 * BATCH, 1, 8, 8, generator=random))
    keys = torch.arange(BATCH)
    drawn = method.drawn(keys, Places(key, BATCH, 0, BATCH))
    return Views(crops, keys, torch.full((BATCH,), -1), drawn=drawn)


def test_the_temperature_rises_step_by_step():
    """A straight line to the last step of its warm-up; the original's by epochs is another."""
    objective = make(teacher_temp_warmup="2ep").objective
    objective.set_length(100, 5)
    found = [objective.teacher_temp(step) for step in (0, 1, 9, 10, 99)]
    assert found == pytest.approx([0.04, 0.04 + 0.03 / 9, 0.07, 0.07, 0.07])


@pytest.mark.parametrize("own", [0, 10])
def test_last_layers_of_all_heads_are_frozen_at_first(own):
    method = make(patch_prototypes=own)
    method.set_length(20, 5)
    for step, frozen in ((4, True), (5, False)):
        method.zero_grad()
        method(views(method), step)["loss"].backward()
        method.before_update(step)
        gradients = {n: p.grad for n, p in method.named_parameters() if p.requires_grad}
        still = {n for n, grad in gradients.items() if grad is None}
        assert still == ({n for n in gradients if "last_layer." in n} if frozen else set())


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
def test_only_masked_patches_are_compared(targets):
    """Whatever else the student says of patches: more room for them changes nothing."""
    method = make(targets=targets, patch_prototypes=9)
    given = views(method)
    first = method(given, 0)
    pad = {
        name: torch.cat([given.drawn[name], given.drawn[name].new_zeros(7)])
        for name in ("patches", "weights")
    }
    again = method(replace(given, drawn=given.drawn | pad), 0)
    for name, value in first.items():
        torch.testing.assert_close(again[name], value)
    other = given.drawn["masked"].roll(1, dims=1)
    moved = method(replace(given, drawn=given.drawn | {"masked": other}), 0)
    assert moved["patch_loss"] != first["patch_loss"]


def test_patches_without_data_are_not_compared():
    """A masked patch that is nothing but missing has no weight; one that has some keeps its own."""
    method = make()
    given = views(method)
    missing = [torch.zeros_like(crop, dtype=torch.bool) for crop in given.crops]
    whole = method(replace(given, missing=missing), 0)
    torch.testing.assert_close(whole["patch_loss"], method(given, 0)["patch_loss"])
    missing[0][:, :, :9] = True
    weights = method.objective._weights(4, replace(given, missing=missing))
    crop, place = given.drawn["patches"] // 16, given.drawn["patches"] % 16
    empty = (crop < BATCH) & (place < 8)
    assert empty.any()
    assert torch.equal(weights, torch.where(empty, 0, given.drawn["weights"]))


def test_teacher_and_centres_move_together():
    method = make(patch_prototypes=9)
    method.set_length(20, 5)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    method(views(method), 0)
    for took in (False, True):
        method.after_update(0, torch.tensor(took))
        after = method.state_dict()
        changed = {k for k in after if not torch.equal(before[k], after[k])}
        assert changed == ({k for k in after if "center" in k} if took else set())
        method(views(method), 0)


def test_without_koleo_its_value_is_still_there():
    """And no gradient: [CLS] of the student alone is moved by the two other losses."""
    with_it, without = make(koleo_weight=0.3), make(koleo_weight=0.0)
    one, two = with_it(views(with_it), 0), without(views(without), 0)
    torch.testing.assert_close(one["koleo"], two["koleo"])
    torch.testing.assert_close(one["loss"], two["loss"] + 0.3 * two["koleo"])


def test_global_crops_are_of_the_encoders_size():
    with pytest.raises(UserError, match=r"--method\.global-size is 20; masks .* 16x16 px"):
        make(global_size=(20,))


def test_a_bottleneck_of_its_own_needs_a_head_of_its_own():
    with pytest.raises(UserError, match=r"patch-bottleneck is 4.*--method\.patch-prototypes"):
        make(patch_bottleneck=4)


def test_uniform_patches_are_a_concern():
    method = make()
    means = {k: v.item() for k, v in method(views(method), 0).items()}
    means |= {"teacher_entropy_share": 0.5, "prototypes_used": 5.0}
    sound = means | {"patch_teacher_entropy_share": 0.7}
    assert method.concerns(sound) == {}
    assert list(method.concerns(means | {"patch_teacher_entropy_share": 1.0})) == [
        "uniform patches"
    ]


def test_parts_that_see_less_are_told_of():
    line = "among the 8 images of each of the 4 parts"
    assert any(line in said for said in make().advice(Setting(100, 32, parts=4)))
    assert any("sinkhorn" in said for said in make(targets="sinkhorn").advice(Setting(9, 32, 4)))
    for method, parts in ((make(), 1), (make(koleo_weight=0.0), 4)):
        assert not any(line in said for said in method.advice(Setting(100, 32, parts)))


def test_networks_are_the_encoder_and_each_head():
    method = make(patch_prototypes=9)
    names = [n for n, p in method.named_parameters() if p.requires_grad]
    found = {method.network_of(name) for name in names}
    assert found == {"encoder", "cls", "patch"}
    assert method.network_of("objectives.dinov2.mask_token") == "encoder"
    assert all(method.network_of(n) == "encoder" for n in names if n.startswith("encoder."))
