"""Gram anchoring in DINOv2: when it begins, to whom, and on which crops."""

from dataclasses import replace

import pytest
import torch

from ssl_vit.benchmarks.costs import count_step
from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import DataConfig
from ssl_vit.common.task import Views
from ssl_vit.data.loader import TrainImages, train_batches
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.order import Order
from ssl_vit.data.sources import open_source
from ssl_vit.methods.dinov2 import DINOv2
from ssl_vit.model.architecture import without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import EncoderInfo, save_encoder
from tests.unit.methods.test_dinov2 import BATCH, ENCODER, SMALL, make, views

GRAM = {"gram_weight": 2.0, "gram_from": "2st", "gram_every": "3st"}
TOOK = torch.tensor(True)


def weights(encoder: Encoder) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in encoder.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, two[key]) for key, value in one.items())


def renewals(method: DINOv2, steps: int) -> list[int]:
    """Numbers of steps after which its teacher was taken anew."""
    method.set_length(20, 5)
    found, objective = [], method.objective
    for step in range(steps):
        with torch.no_grad():
            for parameter in method.encoder.parameters():
                parameter.add_(torch.randn_like(parameter))
        before = weights(objective.gram.encoder)
        method.after_update(step, TOOK)
        after = weights(objective.gram.encoder)
        if not same(before, after):
            assert same(after, weights(objective.teacher.encoder))
            found.append(step + 1)
    return found


def enlarged(given: Views, scale: int) -> Views:
    """The same with larger global crops, as workers make them for Gram anchoring."""
    large = [crop.repeat_interleave(scale, 2).repeat_interleave(scale, 3) for crop in given.crops]
    return replace(given, crops=[*large[:2], given.crops[2]])


def test_its_teacher_is_the_trainings_own_when_it_begins():
    assert renewals(make(**GRAM), 10) == [2, 5, 8]
    assert renewals(make(gram_weight=1.0, gram_from="1ep"), 12) == [5]


def test_its_teacher_is_part_of_the_state():
    """So that a resumed run is anchored to the same."""
    assert any(
        key.startswith("objectives.dinov2.gram.encoder.") for key in make(**GRAM).state_dict()
    )


def test_it_is_nothing_before_it_begins():
    method, without = make(**GRAM), make()
    for one in (method, without):
        one.set_length(20, 5)
    given = enlarged(views(method), 2)
    seen = method.objective._global_crops(given)[0].chunk(2)
    for step in (1, 2):
        plain = without(replace(given, crops=[*seen, given.crops[2]]), step)
        found = method(given, step)
        assert (found["gram_loss"] > 0) == (step == 2)
        torch.testing.assert_close(found["loss"], plain["loss"] + 2 * found["gram_loss"])


def test_workers_make_large_crops_that_the_student_sees_small():
    method = make(**GRAM, gram_scale=3)
    spec = method.view_spec(method.config, method.encoder)
    assert [crop.size for crop in spec.crops] == [(48, 48), (48, 48), (8, 8)]
    given = enlarged(views(method), 3)
    both, seen = method.objective._global_crops(given)
    assert (both.shape[2:], seen.shape[2:]) == ((16, 16), (48, 48))
    method.set_length(20, 5)
    assert method(given, 3)["gram_loss"] > 0
    missing = [torch.zeros_like(crop, dtype=torch.bool) for crop in given.crops]
    missing[1][:, :, :25] = True
    found = method.objective._weights(4, replace(given, missing=missing)) == 0
    crop, place = given.drawn["patches"] // 16, given.drawn["patches"] % 16
    expected = ((crop >= len(given.keys)) & (place < 8)) | (given.drawn["weights"] == 0)
    assert torch.equal(found, expected)


def test_phases_have_masks_and_large_crops_of_their_own():
    """A step of each phase, with and without Gram anchoring."""
    for more in ({}, GRAM):
        method = make(phases=("8:1ep",), **more)
        method.set_length(20, 5)
        spec = method.view_spec(method.config, method.encoder)
        images = TrainImages(open_source("digits:train", DataConfig()), spec, 1, seed=0)
        order = Order(len(images.source), BATCH, 0)
        for step, side in ((0, 8), (order.steps_per_epoch, 16)):
            batch = next(train_batches(images, order, step, step + 1, 0, pin=False))
            large = side * (2 if more else 1)
            assert batch.views.crops[0].shape[-1] == large
            assert batch.views.drawn["masked"].shape == (2 * BATCH, (side // 4) ** 2)
            normalised = Normalize((0.3,), (0.4,))(batch.views)
            assert method(normalised, step)["loss"].isfinite()


def test_its_cost_is_counted():
    """On fake tensors, by benchmark scale: nothing of it reads the device."""
    with without_memory():
        methods = [DINOv2(replace(SMALL, **own), ENCODER, 1) for own in ({}, {"gram_weight": 1.0})]
    plain, gram = (count_step(m, m.view_spec(m.config, m.encoder), 1).flops for m in methods)
    assert gram > 1.5 * plain


def saved(folder, **changed) -> str:
    torch.manual_seed(5)
    encoder = Encoder(replace(ENCODER, **changed), 1)
    about = EncoderInfo(encoder.config, 1, (0.5,), (0.2,))
    save_encoder(folder / "encoder.safetensors", encoder, about)
    return str(folder)


def test_its_teacher_may_be_a_file(tmp_path):
    """That of another size, too; it stays unless it is to be taken anew."""
    name = saved(tmp_path)
    method = make(gram_weight=1.0, gram_encoder=name)
    torch.manual_seed(5)
    assert same(Encoder(ENCODER, 1).state_dict(), weights(method.objective.gram.encoder))
    assert renewals(method, 8) == []
    assert renewals(make(**GRAM, gram_encoder=name), 10) == [5, 8]
    given = {k: torch.randn_like(v) for k, v in method.encoder.vit.state_dict().items()}
    before = weights(method.objective.gram.encoder)
    method.begin_with(given, "given")
    assert same(before, weights(method.objective.gram.encoder))
    larger = tmp_path / "larger"
    larger.mkdir()
    make(gram_weight=1.0, gram_encoder=saved(larger, image_size=(24,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gram_encoder": "x"}, r"gram-encoder is 'x'; it has no effect without --method\.gram-w"),
        ({"gram_encoder": "x", "gram_weight": 1.0}, r"^--method\.gram-encoder is 'x'; no"),
        ({"gram_every": "0st", "gram_weight": 1.0}, r"--method\.gram-every is '0st'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_a_file_of_another_encoder_is_refused(tmp_path):
    name = saved(tmp_path, width=32)
    with pytest.raises(UserError, match=r"--method\.gram-encoder .*(shape|patch_embed|32)"):
        make(gram_weight=1.0, gram_encoder=name)
