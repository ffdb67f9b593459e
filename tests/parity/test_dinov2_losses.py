"""DINOv2's losses against numbers recorded from the original, in float64, relative 1e-6."""

import pytest
import torch

from ssl_vit.objectives.centering import Center
from ssl_vit.objectives.cross_entropy import cross_entropy_of_rows, cross_entropy_of_views
from ssl_vit.objectives.gram import gram_loss, resized_patches
from ssl_vit.objectives.koleo import koleo, nearest_distances
from ssl_vit.objectives.sinkhorn import sinkhorn_knopp
from tests.parity.golden import check_there_are, close, golden_files, read_golden

LOSSES, GRAMS = golden_files("dinov2_loss_*.safetensors"), golden_files("dinov3_gram.safetensors")
TOOK = torch.tensor(True)


@pytest.mark.parametrize("pattern", ["dinov2_loss_*.safetensors", "dinov3_gram.safetensors"])
def test_there_are_golden_files(pattern):
    check_there_are(golden_files(pattern), pattern)


class Losses:
    """A golden file: its inputs in float64, and the targets of both kinds."""

    def __init__(self, path) -> None:
        self.config, self.golden = read_golden(path)

    def input(self, name: str) -> torch.Tensor:
        return self.golden[name].double().requires_grad_()

    def targets(self, kind: str, name: str) -> torch.Tensor:
        """Of [CLS] (name ``cls``) or patches, in the order of the crops."""
        outputs = self.golden[f"teacher_{name}"].double()
        center = self.center(kind, name)
        if kind == "sinkhorn":
            return sinkhorn_knopp(outputs / self.temperature, self.config["sinkhorn_iterations"])
        return (center(outputs) / self.temperature).softmax(-1)

    def center(self, kind: str, name: str) -> Center:
        value = self.golden["center" if name == "cls" else "patch_center"].double().flatten()
        center = Center(len(value), self.config["center_momentum"]).double().train()
        center.value.copy_(value)
        self.centers = getattr(self, "centers", {}) | {name: center}
        return center

    @property
    def temperature(self) -> float:
        return self.config["teacher_temp"]


@pytest.fixture(params=LOSSES, ids=lambda path: path.stem)
def case(request) -> Losses:
    return Losses(request.param)


@pytest.mark.parametrize("kind", ["centering", "sinkhorn"])
def test_cls_loss(case, kind):
    """Targets, the sum of both recorded terms, gradients; with centring, the centre afterwards."""
    batch = case.config["batch"]
    target = case.targets(kind, "cls").unflatten(0, (2, batch))
    close(target.flip(0), case.golden[f"{kind}.cls_targets_swapped"], "targets")
    crops = {name: case.input(name) for name in ("student_global", "student_local")}
    student = torch.cat(list(crops.values())).unflatten(0, (-1, batch))
    loss = cross_entropy_of_views(target, student, case.config["student_temp"])
    expected = case.golden[f"{kind}.local_loss"] + case.golden[f"{kind}.global_loss"]
    close(loss[None], expected, "loss")
    loss.backward()
    for name, crop in crops.items():
        close(crop.grad, case.golden[f"{kind}.grads.{name}"], name)
    if kind == "centering":
        case.centers["cls"].update(TOOK)
        close(case.centers["cls"].value[None], case.golden["centering.center_after"], "centre")


@pytest.mark.parametrize("padding", [0, 12])
@pytest.mark.parametrize("kind", ["centering", "sinkhorn"])
def test_patch_loss(case, kind, padding):
    """The same however many rows are there that do not count."""
    masks = case.golden["masks"].double()
    weights = (masks / masks.sum(1, keepdim=True).clamp(min=1)).flatten()
    weights = weights[weights > 0]
    close(weights, case.golden["masks_weight"], "weights")
    rows = len(weights)
    patches, valid = case.input("student_patch"), torch.ones(rows + padding).double()
    valid[rows:] = 0
    pad = torch.nn.functional.pad
    # Padding repeats a row, as what is gathered by an index of 0 does.
    teacher = case.golden["teacher_patch"]
    case.golden["teacher_patch"] = torch.cat([teacher, teacher[:1].expand(padding, -1) + 3])
    outputs = case.golden["teacher_patch"].double()
    if kind == "sinkhorn":
        scaled = outputs / case.temperature
        target = sinkhorn_knopp(scaled, case.config["sinkhorn_iterations"], valid)
    else:
        target = (case.center(kind, "patch")(outputs, valid) / case.temperature).softmax(-1)
    close(target[:rows], case.golden[f"{kind}.patch_targets"], "targets")
    student = torch.cat([patches, patches[:1].expand(padding, -1)])
    share = pad(weights, (0, padding)) / len(masks)
    loss = cross_entropy_of_rows(target, student, share, case.config["student_temp"])
    close(loss[None], case.golden[f"{kind}.ibot_loss"], "loss")
    loss.backward()
    close(patches.grad, case.golden[f"{kind}.grads.student_patch"], "gradient")
    if kind == "centering":
        center = case.centers["patch"]
        center.update(TOOK)
        close(center.value[None, None], case.golden["centering.patch_center_after"], "centre")


def test_koleo(case):
    features, weight = case.input("cls_features"), case.config["koleo_weight"]
    each = [koleo(nearest_distances(crop)) for crop in features.chunk(2)]
    close(torch.stack(each), case.golden["koleo.per_crop"], "per crop")
    loss = weight * sum(each)
    close(loss[None], case.golden["koleo.loss"], "loss")
    loss.backward()
    close(features.grad, case.golden["koleo.grads.cls_features"], "gradient")


NEGATIVES = {"remove_neg": "zero", "remove_only_teacher_neg": "teacher's zero"}


@pytest.mark.parametrize("path", GRAMS, ids=lambda path: path.stem)
def test_gram_loss(path):
    """The teacher's patches resized, loss and gradient for every recorded set of options."""
    config, golden = read_golden(path)
    grids = [(config[f"{name}_grid"],) * 2 for name in ("teacher", "student")]
    teacher = resized_patches(golden["teacher_patches"].double(), *grids)
    close(teacher, golden["teacher_patches_resized"], "resized")
    for name, options in config["options"].items():
        student = golden["student_patches"].double().requires_grad_()
        negatives = next((NEGATIVES[key] for key in NEGATIVES if options[key]), "kept")
        loss = gram_loss(
            student,
            teacher,
            normalize=options["apply_norm"],
            per_image=options["img_level"],
            negatives=negatives,
        )
        close(loss[None], golden[f"{name}.loss"], name)
        loss.backward()
        close(student.grad, golden[f"{name}.grads.student_patches"], name)
