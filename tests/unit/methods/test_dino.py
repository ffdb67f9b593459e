"""DINO's parts against loops and closed forms; parity with the original is tested elsewhere."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.common.config import EncoderConfig, OptimConfig, RunConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.task import Views
from ssl_vit.data.batch import Batch
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods.dino import DINO
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.execution import choose_attention
from ssl_vit.objectives.cross_entropy import cross_entropy_of_views
from ssl_vit.objectives.ema import ema_update, move_where
from ssl_vit.objectives.heads import ProjectionHead, PrototypeLayer
from ssl_vit.options.dino import DINOConfig
from ssl_vit.training.loop import Trainer
from ssl_vit.training.optim import Schedule
from ssl_vit.training.parallel import Parallel

CPU = torch.device("cpu")
ENCODER = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(16,), patch_size=4, width=24, depth=2, heads=2
)
SMALL = DINOConfig(prototypes=32, head_width=16, bottleneck=8, local_crops=3, local_size=(8,))


def dino(config: DINOConfig = SMALL, encoder: EncoderConfig = ENCODER, channels: int = 3) -> DINO:
    torch.manual_seed(0)
    method = DINO(config, encoder, channels)
    choose_attention(method, CPU)
    return method


def batch(n: int, config: DINOConfig = SMALL, channels: int = 3, seed: int = 0) -> Views:
    """Random crops of the sizes that DINO asks for."""
    generator = torch.Generator().manual_seed(seed)
    large, small = config.sizes((16, 16), 4)
    shapes = [(n, channels, *large)] * 2
    shapes += [(n * config.local_crops, channels, *small)] if config.local_crops else []
    crops = [torch.randn(s, generator=generator) for s in shapes]
    return Views(crops, torch.arange(n), torch.full((n,), -1))


class AsIs(Normalize):
    """Crops that are normalised already."""

    def forward(self, views: Views) -> Views:
        return views


def trainer(method: DINO, length: str = "10st", **optim) -> Trainer:
    run, config = RunConfig(length=length), OptimConfig(lr=0.01, warmup="0st", **optim)
    schedule, normalize = Schedule(run, config, steps_per_epoch=5), AsIs((0.0,), (1.0,))
    return Trainer(method, run, config, schedule, normalize, Parallel(0, 1, CPU), torch.float32)


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("g", "v"), [(2, 2), (2, 7), (1, 3), (3, 4)])
def test_loss_is_the_loop_over_pairs(g, v):
    """Value and gradient, against the nested loop."""
    torch.manual_seed(1)
    target = (torch.randn(g, 5, 11).double() * 3).softmax(-1)
    student = (torch.randn(v, 5, 11).double() * 10).requires_grad_()
    total, pairs = 0.0, 0
    for t in range(g):
        for s in range(v):
            if s != t:
                total = total - (target[t] * student[s].log_softmax(-1)).sum(-1).mean()
                pairs += 1
    (expected,) = torch.autograd.grad(total / pairs, student)
    loss = cross_entropy_of_views(target, student)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, total / pairs, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)


def test_the_loss_divides_by_its_temperature_and_is_never_rounded():
    torch.manual_seed(0)
    target = torch.randn(2, 3, 50).mul_(9).softmax(-1)
    logits = torch.randn(5, 3, 50).requires_grad_()
    expected = cross_entropy_of_views(target, logits / 0.1)
    expected.backward()
    gradient, logits.grad = logits.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy_of_views(target, logits, 0.1)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-5, atol=1e-7)


def test_local_crops_are_paired_with_their_own_image():
    """Crops come view by view; the loss of a batch is the mean of its images' losses."""
    method, views = dino().eval(), batch(4)
    method.objective.center.value.normal_()
    together = method(views, 0)["loss"]
    alone = []
    for i in range(4):
        crops = [c.unflatten(0, (-1, 4))[:, i] for c in views.crops]
        alone.append(method(Views(crops, views.keys[:1], views.labels[:1]), 0)["loss"])
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("local", [0, 1, 3])
def test_any_number_of_local_crops(local):
    config = dataclasses.replace(SMALL, local_crops=local)
    method = dino(config)
    scalars = method(batch(2, config), 0)
    scalars["loss"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    assert len(DINO.views(config, method.encoder).crops) == 2 + (local > 0)


def test_gradients_reach_the_student_only():
    method = dino()
    method(batch(2), 0)["loss"].backward()
    teacher = list(method.objective.teacher.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher)
    assert method.encoder.vit.pos_embed.grad.abs().max() > 0


# --- the head -------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_head(depth):
    """Depth, the unit-length bottleneck, and rows of prototypes scaled to their gain."""
    head = dino(dataclasses.replace(SMALL, head_depth=depth, norm_last_layer=False)).objective.head
    assert isinstance(head, ProjectionHead)
    assert sum(isinstance(m, nn.Linear) for m in head.mlp) == depth
    assert sum(isinstance(m, nn.GELU) for m in head.mlp) == depth - 1
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
    x = torch.randn(6, 24)
    v, g = head.last_layer.weight_v, head.last_layer.weight_g
    expected = F.normalize(head.mlp(x), dim=1) @ (g * v / v.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(head(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fixed", [True, False])
def test_the_last_layer_learns_as_torchs(fixed):
    """Weight normalisation by torch: outputs, and the gradients of x, v and the gain."""
    torch.manual_seed(0)
    ours = PrototypeLayer(8, 40, fixed_gain=fixed).double()
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(8, 40, bias=False).double(), dim=0)
    gain, direction = theirs.parametrizations.weight.original0, ours.weight_v
    with torch.no_grad():
        ours.weight_g.uniform_(0.5, 2)
        gain.copy_(ours.weight_g)
        theirs.parametrizations.weight.original1.copy_(direction)
    towards, found = torch.randn(6, 40).double(), []
    for layer in (ours, theirs):
        x = torch.arange(48.0).double().sin().view(6, 8).requires_grad_()
        out = layer(x)
        out.backward(towards)
        found.append([out, x.grad])
    found[0] += [direction.grad] + ([] if fixed else [ours.weight_g.grad])
    found[1] += [theirs.parametrizations.weight.original1.grad] + ([] if fixed else [gain.grad])
    assert fixed == (ours.weight_g.grad is None)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_last_layers_product_is_as_precise_as_autocast_says(enabled):
    """Even where what it is given is not rounded yet; what it returns never is."""
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                seen.append(args[-1].dtype)
            return func(*args, **(kwargs or {}))

    layer = PrototypeLayer(8, 40, fixed_gain=True)
    x = torch.randn(6, 8).requires_grad_()
    with Products():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = layer(x)
        out.sum().backward()
    assert out.dtype == x.grad.dtype == layer.weight_v.grad.dtype == torch.float32
    assert seen == [torch.bfloat16 if enabled else torch.float32] * 3


def test_fixed_gain_is_not_trained():
    for fixed in (True, False):
        method = dino(dataclasses.replace(SMALL, norm_last_layer=fixed))
        assert method.objective.head.last_layer.weight_g.requires_grad is not fixed
        assert torch.equal(method.objective.head.last_layer.weight_g, torch.ones(32, 1))


# --- initialisation -------------------------------------------------------------------------------


def test_teacher_starts_as_the_student():
    method = dino()
    for teacher, student in (
        (method.objective.teacher.encoder, method.encoder),
        (method.objective.teacher.head, method.objective.head),
    ):
        ours, theirs = teacher.state_dict(), student.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert ours[next(iter(ours))].data_ptr() != theirs[next(iter(ours))].data_ptr()
    assert method.exported_encoder() is method.objective.teacher.encoder


def test_initial_weights():
    """Truncated normal with σ = .02; biases 0; positions and [CLS] too."""
    method = dino(encoder=dataclasses.replace(ENCODER, width=192, heads=3))
    vit = method.encoder.vit
    for weight in (vit.blocks[0].mlp.fc1.weight, vit.blocks[1].attn.qkv.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert vit.blocks[0].mlp.fc1.bias.abs().max() == 0
    assert method.objective.head.mlp[0].bias.abs().max() == 0
    assert method.objective.head.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_drop_path_is_the_students_alone():
    method = dino(encoder=dataclasses.replace(ENCODER, drop_path=0.5)).train()
    images = torch.randn(16, 3, 16, 16)
    torch.testing.assert_close(
        method.objective.teacher.encoder(images).cls, method.objective.teacher.encoder(images).cls
    )
    assert not torch.equal(method.encoder(images).cls, method.encoder(images).cls)
    assert method.exported_encoder().config.drop_path == 0


def test_fixed_positions_stay_fixed():
    method = dino(encoder=dataclasses.replace(ENCODER, positions="sincos"))
    assert not method.encoder.vit.pos_embed.requires_grad
    assert torch.equal(method.encoder.vit.pos_embed, method.objective.teacher.encoder.vit.pos_embed)
    assert method.encoder.vit.pos_embed.abs().max() == 1


# --- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [
        # By epoch, as numpy.linspace(.04, .07, 4): steps of an epoch share a value.
        ("4ep", (0, 4, 5, 14, 15, 19, 20, 99), (0.04, 0.04, 0.05, 0.06, 0.07, 0.07, 0.07, 0.07)),
        ("4st", (0, 1, 2, 3, 4, 50), (0.04, 0.05, 0.06, 0.07, 0.07, 0.07)),
        ("0ep", (0, 7), (0.07, 0.07)),
        ("1ep", (0, 4, 5), (0.04, 0.04, 0.07)),
    ],
)
def test_teacher_temperature(warmup, steps, expected):
    config = dataclasses.replace(
        SMALL, teacher_temp=0.07, teacher_temp_start=0.04, teacher_temp_warmup=warmup
    )
    method = dino(config)
    method.set_length(100, 5)
    assert [method.objective.teacher_temp(s) for s in steps] == pytest.approx(expected)


def test_teacher_momentum():
    method = dino(dataclasses.replace(SMALL, momentum=0.9))
    method.set_length(100, 10)
    assert method.objective.teacher_momentum(0) == pytest.approx(0.9)
    assert method.objective.teacher_momentum(50) == pytest.approx(0.95)
    assert method.objective.teacher_momentum(100) == pytest.approx(1.0)


def test_frozen_last_layer():
    """For its span the last layer stays, moments and decay included; the rest moves."""
    method = dino(dataclasses.replace(SMALL, freeze_last_layer="2st", norm_last_layer=False))
    run = trainer(method, weight_decay=0.5)
    first = [p.detach().clone() for p in method.objective.head.last_layer.parameters()]
    for step in range(3):
        before = method.objective.head.mlp[0].weight.detach().clone()
        run.update([Batch(batch(4, seed=step))])
        run.step += 1
        same = [
            torch.equal(a, b)
            for a, b in zip(first, method.objective.head.last_layer.parameters(), strict=True)
        ]
        assert same == [step < 2] * 2
        assert not torch.equal(before, method.objective.head.mlp[0].weight)
    state = run.optimizer.state[method.objective.head.last_layer.weight_v]
    assert state["step"] == 1


# --- teacher and centre -------------------------------------------------------------------------


def test_teacher_and_centre_move_after_the_update():
    """Teacher: the average with the student's *new* weights. Centre: with the mean output."""
    method = dino(dataclasses.replace(SMALL, momentum=0.75, center_momentum=0.6))
    run = trainer(method)
    method.objective.center.value.normal_()
    center, views = method.objective.center.value.clone(), batch(4)
    before = [p.clone() for p in method.objective.teacher.encoder.parameters()]
    with torch.no_grad():
        output = method.objective.teacher.head(
            method.objective.teacher.encoder(torch.cat(views.crops[:2])).cls
        )
    run.update([Batch(views)])
    for old, teacher, student in zip(
        before,
        method.objective.teacher.encoder.parameters(),
        method.encoder.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(teacher, 0.75 * old + 0.25 * student)
    torch.testing.assert_close(method.objective.center.value, 0.6 * center + 0.4 * output.mean(0))


def test_centre_is_that_of_all_parts():
    """Accumulated parts give the centre, the gradients and the teacher of the whole batch."""
    views = batch(6)
    halves = [
        Views(
            [c.unflatten(0, (-1, 6))[:, part].flatten(0, 1) for c in views.crops],
            views.keys[part],
            views.labels[part],
        )
        for part in (slice(0, 3), slice(3, 6))
    ]
    whole, parts = trainer(dino()), trainer(dino())
    # A zero rate: Adam's first step divides by gradients that may be rounding noise.
    for run in (whole, parts):
        run.schedule.lr = lambda step: 0.0
    a = whole.update([Batch(views)])
    b = parts.update([Batch(h) for h in halves])
    torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(whole.task.objective.center.value, parts.task.objective.center.value)
    for p, q in zip(whole.trained, parts.trained, strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6)
    assert parts.task.objective.center._seen == []


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_nothing_moves_on_a_step_that_is_not_finite(broken):
    """Neither student, moments, teacher nor centre; and the next step is a normal one."""
    method = dino()
    run = trainer(method)
    run.update([Batch(batch(4))])
    before = {k: v.clone() for k, v in method.state_dict().items()}
    views = batch(4, seed=1)
    if broken == "loss":
        views.crops[0][0, 0, 0, 0] = torch.nan
    else:
        hook = method.encoder.vit.norm.weight.register_hook(lambda g: g * torch.inf)
    scalars = run.update([Batch(views)])
    assert scalars["skipped"] == 1
    after = method.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    if broken == "gradient":
        hook.remove()
    assert run.update([Batch(batch(4, seed=2))])["skipped"] == 0
    assert not torch.equal(before["objectives.dino.center.value"], method.objective.center.value)
    assert torch.isfinite(method.objective.center.value).all()


@pytest.mark.parametrize("took", [True, False])
def test_moving_average(took):
    """The closed form where the step was taken; both ways of computing it; the source stays."""
    torch.manual_seed(0)
    average, source, flag = nn.Linear(3, 2), nn.Linear(3, 2), torch.tensor(took)
    old, new = ([p.detach().clone() for p in m.parameters()] for m in (average, source))
    expected = [0.9 * a + 0.1 * b for a, b in zip(old, new, strict=True)] if took else old
    without_reading = [p.clone() for p in old]
    move_where(without_reading, new, 1 - 0.9, flag)
    ema_update(average, source, 0.9, flag)
    for found in (list(average.parameters()), without_reading):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6 if took else 0, atol=1e-7 if took else 0)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), new, strict=True))


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prototypes": 0}, "--method.prototypes is 0"),
        ({"momentum": 1.5}, "--method.momentum is 1.5"),
        ({"teacher_temp": 0.0}, "--method.teacher-temp is 0; it must be above 0"),
        ({"global_scale": (0.5, 0.4)}, "--method.global-scale is 0.5 0.4"),
        ({"local_crops": -1}, "--method.local-crops is -1"),
        ({"blur": (1.0, 2.0, 0.0)}, "--method.blur is 1 2 0; it must lie in [0, 1]"),
        ({"blur_sigma": (0.0, 1.0)}, "--method.blur-sigma is 0 1; it must be 0 < least <= most"),
        ({"freeze_last_layer": "1"}, "--method.freeze-last-layer is '1'"),
        ({"global_size": (1, 2, 3)}, "--method.global-size is 1 2 3"),
        (
            {"phases": ("112",)},
            "--method.phases is '112'; allowed: a size and its end, as 112:75ep",
        ),
        ({"phases": ("0:5ep",)}, "--method.phases is '0:5ep'; allowed"),
        ({"phases": ("8:5",)}, "--method.phases is '5'; allowed: epochs as 10ep"),
        ({"phases": ("8:5ep", "12:5ep")}, "--method.phases is 8:5ep 12:5ep; ends must rise"),
        ({"phases": ("8:5ep", "12:70st")}, "--method.phases is 8:5ep 12:70st; ends must rise"),
    ],
)
def test_refused_options(change, said):
    with pytest.raises(UserError) as error:
        dataclasses.replace(SMALL, **change)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_sizes():
    """96 beside 224 with patches of 16, as in the paper; whole patches always."""
    assert DINOConfig().sizes((224, 224), 16) == ((224, 224), (96, 96))
    assert DINOConfig().sizes((224, 224), 8) == ((224, 224), (96, 96))
    assert DINOConfig().sizes((32, 64), 4) == ((32, 64), (12, 28))
    config = DINOConfig(global_size=(24,), local_size=(8, 12))
    assert config.sizes((32, 32), 4) == ((24, 24), (8, 12))
    with pytest.raises(UserError, match=r"--method\.local-size is 10x10"):
        DINOConfig(local_size=(10,)).sizes((32, 32), 4)


def test_views_are_the_originals():
    """Sizes, areas and numbers of crops; which of them is blurred and solarised how often."""
    encoder = Encoder(EncoderConfig(arch="vit_tiny_patch16_224", depth=1))
    views = DINO.views(DINOConfig(), encoder).crops
    assert [(c.count, c.size, c.scale) for c in views] == [
        (1, (224, 224), (0.4, 1.0)),
        (1, (224, 224), (0.4, 1.0)),
        (8, (96, 96), (0.05, 0.4)),
    ]
    assert [(c.photometric.blur, c.photometric.solarize) for c in views] == [
        (1.0, 0.0),
        (0.1, 0.2),
        (0.5, 0.0),
    ]
    for crop in views:
        p = crop.photometric
        assert (crop.flip, p.jitter, p.gray, p.blur_sigma) == (0.5, 0.8, 0.2, (0.1, 2.0))
        assert (p.brightness, p.contrast, p.saturation, p.hue) == (0.4, 0.4, 0.2, 0.1)


def test_phases():
    """Local crops keep their proportion to the global ones, in whole patches; all else stays."""
    encoder = Encoder(EncoderConfig(arch="vit_tiny_patch16_224", depth=1))
    config = DINOConfig(phases=("112:3ep", "160x192:5ep"))
    spec = DINO.view_spec(config, encoder)
    found = [[crop.size for crop in spec.at(step, 10).crops] for step in (29, 30, 49, 50)]
    assert found == [
        [(112, 112), (112, 112), (48, 48)],
        [(160, 192), (160, 192), (64, 80)],
        [(160, 192), (160, 192), (64, 80)],
        [(224, 224), (224, 224), (96, 96)],
    ]
    small, last = spec.at(0, 10), spec.at(50, 10)
    assert [dataclasses.replace(c, size=(1, 1)) for c in small.crops] == [
        dataclasses.replace(c, size=(1, 1)) for c in last.crops
    ]
    with pytest.raises(UserError, match=r"phases is 100x100; the patch size, 16, must divide it"):
        DINO.views(DINOConfig(phases=("100:3ep",)), encoder)


def test_a_phase_to_the_end_is_said(caplog):
    method = dino(dataclasses.replace(SMALL, phases=("8:2ep",)))
    method.set_length(100, 10)
    assert not caplog.messages
    method.set_length(20, 10)
    assert "larger crops are never seen" in caplog.text


def test_an_encoder_without_cls_is_refused():
    config = EncoderConfig(arch="vit_base_patch16_siglip_224")
    assert Encoder(config).vit.cls_token is None
    with pytest.raises(UserError, match="which it lacks"):
        DINO(SMALL, config, 3)


# --- health ---------------------------------------------------------------------------------------


def test_health_numbers():
    """Against their definitions, for outputs made up here."""
    method = dino()
    logits = torch.randn(2, 6, 32) * 4
    target = logits.softmax(-1)
    student = torch.randn(5, 6, 32)
    loss = cross_entropy_of_views(target, student)
    found = method.objective._health(loss, target)
    entropy = -(target * target.log()).sum(-1).mean()
    marginal = target.mean((0, 1))
    pairs = [
        (target[t] * (target[t].log() - student[s].log_softmax(-1))).sum(-1).mean()
        for t in range(2)
        for s in range(5)
        if s != t
    ]
    torch.testing.assert_close(found["teacher_entropy"], entropy)
    torch.testing.assert_close(found["teacher_entropy_share"], entropy / math.log(32))
    torch.testing.assert_close(found["kl"], torch.stack(pairs).mean())
    used = (-(marginal * marginal.log()).sum()).exp()
    torch.testing.assert_close(found["prototypes_used"], used)


def test_concerns():
    method = dino()
    method.objective.images = 64
    fine = {"teacher_entropy_share": 0.5, "prototypes_used": 20.0}
    assert method.concerns(fine) == {}
    assert list(method.concerns(fine | {"teacher_entropy_share": 0.999})) == ["uniform output"]
    assert list(method.concerns(fine | {"prototypes_used": 1.01})) == ["one prototype"]
    method.objective.images = 1
    assert method.concerns(fine | {"prototypes_used": 1.01}) == {}, "one image has one prototype"


def test_a_last_layer_that_never_moves_is_told(caplog):
    method = dino(dataclasses.replace(SMALL, freeze_last_layer="5ep"))
    method.set_length(50, 10)
    assert "--method.freeze-last-layer is 5ep, the whole training" in caplog.text
    caplog.clear()
    method.set_length(51, 10)
    assert not caplog.text


def test_looking_does_not_move_the_centre():
    """Only outputs of training steps enter it."""
    method = dino().eval()
    method(batch(4), 0)
    assert method.objective.center._seen == []
