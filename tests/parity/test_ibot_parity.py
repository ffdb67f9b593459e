"""iBOT's losses, centres, head and temperatures against numbers recorded from the original, in
float64, relative 1e-6."""

import pytest
import torch

from ssl_vit.common.config import EncoderConfig
from ssl_vit.methods.ibot import IBOT
from ssl_vit.objectives.cross_entropy import cross_entropy_of_rows, cross_entropy_of_views
from ssl_vit.options.ibot import IBOTConfig
from tests.parity.golden import check_there_are, close, golden_files, read_golden

FILES = golden_files("ibot_loss*.safetensors")
TOOK = torch.tensor(True)


def test_there_are_golden_files():
    check_there_are(FILES, "ibot_loss*.safetensors")


class Case:
    """A golden file, and a method with its options; the encoder is as wide as the head's input."""

    def __init__(self, path) -> None:
        self.config, self.golden = read_golden(path)
        c = self.config
        self.own = self.method(c["patch_out_dim"])
        self.objective = self.own.objective
        self.objective.set_length(c["nepochs"] * 3, 3)
        self.step = c["epoch"] * 3 + 2
        for targets, name in (("cls_targets", "center"), ("patch_targets", "center2")):
            center = getattr(self.objective, targets).center
            center.momentum = c["center_momentum" if name == "center" else "center_momentum2"]
            center.value.copy_(self.golden[name].flatten())

    def method(self, patch_prototypes: int) -> IBOT:
        c, head = self.config, self.config["head"]
        width = head["in_dim"]
        encoder = EncoderConfig(
            "vit_tiny_patch16_224",
            image_size=tuple(8 * side for side in c["grid"]),
            patch_size=8,
            width=width,
            depth=1,
            heads=2,
        )
        config = IBOTConfig(
            prototypes=c["out_dim"],
            patch_prototypes=patch_prototypes,
            head_depth=head["nlayers"],
            head_width=head["hidden_dim"],
            bottleneck=head["bottleneck_dim"],
            teacher_temp_start=c["warmup_teacher_temp"],
            teacher_temp=c["teacher_temp"],
            patch_temp_start=c["warmup_teacher_temp2"],
            patch_temp=c["teacher_temp2"],
            teacher_temp_warmup=f"{c['warmup_teacher_temp_epochs']}ep",
            student_temp=c["student_temp"],
            patch_weight=c["lambda2"],
        )
        return IBOT(config, encoder, 3).double().train()

    def input(self, name: str) -> torch.Tensor:
        return self.golden[name].double().requires_grad_()


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def case(request) -> Case:
    return Case(request.param)


def test_temperatures(case):
    """Of [CLS] and of patches: they rise by epoch."""
    c, own = case.config, case.objective
    steps = [3 * epoch for epoch in range(c["nepochs"])]
    cls = [own.teacher_temp(step) for step in steps]
    patch = [own.warmed(own.config.patch_temp_start, own.config.patch_temp, s) for s in steps]
    close(torch.tensor(cls, dtype=torch.float64), case.golden["teacher_temp_schedule"], "[CLS]")
    close(
        torch.tensor(patch, dtype=torch.float64), case.golden["teacher_temp2_schedule"], "patches"
    )


def test_cls_loss(case):
    """Loss, gradients, and the centre afterwards."""
    batch, own = case.config["batch"], case.objective
    teacher = case.golden["teacher_cls"].double()
    target = own.cls_targets(teacher, own.teacher_temp(case.step)).unflatten(0, (2, batch))
    crops = [case.input(name) for name in ("student_cls", "student_local_cls")]
    student = torch.cat(crops).unflatten(0, (-1, batch))
    loss = cross_entropy_of_views(target, student, own.config.student_temp)
    (case.config["lambda1"] * loss).backward()
    close(case.config["lambda1"] * loss[None], case.golden["loss_cls"], "loss")
    for crop, name in zip(crops, ("student_cls", "student_local_cls"), strict=True):
        close(crop.grad, case.golden[f"grads.{name}"], name)
    own.cls_targets.update(TOOK)
    close(own.cls_targets.center.value[None], case.golden["center_after"], "centre")


def test_patch_loss(case):
    """Of what is masked, in the two global crops; the centre moves by all patches."""
    own = case.objective
    count = case.config["ngcrops"] * case.config["batch"]
    masks = case.golden["masks"][: case.config["ngcrops"]].flatten(2).flatten(0, 1).double()
    weights = (masks / masks.sum(1, keepdim=True).clamp(min=1)).flatten()
    patches = weights.nonzero()[:, 0]
    teacher, student = case.golden["teacher_patch"].double(), case.input("student_patch")
    own.patch_outputs = lambda head, features: features  # these are outputs
    target = own.patch_target(teacher.flatten(0, 1), patches, weights[patches], case.step)
    rows = student.flatten(0, 1).index_select(0, patches)
    share = weights[patches] / count
    loss = cross_entropy_of_rows(target, rows, share, own.config.student_temp)
    loss = own.config.patch_weight * loss
    loss.backward()
    close(loss[None], case.golden["loss_patch"], "loss")
    close(student.grad, case.golden["grads.student_patch"], "gradient")
    own.patch_targets.update(TOOK)
    close(own.patch_targets.center.value[None, None], case.golden["center2_after"], "centre")


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_head(case, kind):
    """[CLS] and patches through one MLP, to a last layer of their own or the same."""
    method = case.method(case.config["patch_out_dim"] if kind == "separate" else 0)
    start, head = f"head_{kind}.", method.objective.head
    state = {
        name.removeprefix(start): value.double()
        for name, value in case.golden.items()
        if name.startswith(start)
    }
    patch = {k: v for k, v in state.items() if k.startswith("last_layer2.")}
    head["cls"].load_state_dict({k: v for k, v in state.items() if k not in patch}, strict=True)
    if kind == "separate":
        own = {k.replace("last_layer2.", "last_layer."): v for k, v in patch.items()}
        head["patch"].load_state_dict(own, strict=True)
    tokens, expected = case.golden["tokens"].double(), f"head_{kind}_out"
    close(head["cls"](tokens[:, 0]), case.golden[f"{expected}.cls"], "[CLS]")
    found = method.objective.patch_outputs(head, tokens[:, 1:].flatten(0, 1))
    close(found.unflatten(0, (len(tokens), -1)), case.golden[f"{expected}.patch"], "patches")
