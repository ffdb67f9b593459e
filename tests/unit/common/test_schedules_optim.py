"""Schedules in closed form, the decay rule, clipping, and the step that skips itself."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.common.config import OptimConfig, RunConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.rates import PretrainOptim
from ssl_vit.common.schedules import Length, warmup_cosine
from ssl_vit.common.task import Place, Task
from ssl_vit.training.clipping import clip_gradients
from ssl_vit.training.optim import (
    Schedule,
    guarded_step,
    make_optimizer,
    set_rates,
)


class Toy(Task):
    """A linear map with a norm, a token and a fixed parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.fixed = nn.Parameter(torch.randn(2, 2), requires_grad=False)


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def give_gradients(task: nn.Module, seed: int, scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in task.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    return trained


# --- the schedule -------------------------------------------------------------------------------


class Multiplied(TorchDispatchMode):
    """Overloads by which lists of tensors are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.startswith("_foreach_mul_"):
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_clipping_all_alike_multiplies_by_one_tensor():
    """A list of factors takes a launch for each gradient, on GPUs."""
    parameters = [nn.Parameter(torch.ones(n)) for n in (2, 3, 4)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with Multiplied() as made:
        clip_gradients(parameters, OptimConfig(clip=0.5))
    assert made.seen == ["_foreach_mul_.Tensor"]
    assert float(torch.cat([p.grad for p in parameters]).norm()) == pytest.approx(0.5, rel=1e-4)


def test_warmup_cosine_at_its_corners():
    """0, half way up, the peak, half way down, the end and beyond it."""
    points = {0: 0.0, 5: 1.0, 10: 2.0, 60: 1.1, 110: 0.2, 200: 0.2}
    for step, expected in points.items():
        found = warmup_cosine(step, warmup=10, total=110, peak=2.0, end=0.2)
        assert found == pytest.approx(expected, abs=1e-12)
    assert warmup_cosine(0, warmup=0, total=10, peak=3.0) == 3.0
    assert warmup_cosine(4, warmup=4, total=4, peak=3.0) == 3.0


def test_warmup_cosine_is_the_originals():
    """MAE's ``adjust_learning_rate``, written in epochs that may be fractions."""
    per_epoch, warmup, epochs, lr, min_lr = 7, 3, 20, 1.5, 0.25

    def original(epoch: float) -> float:
        if epoch < warmup:
            return lr * epoch / warmup
        share = (epoch - warmup) / (epochs - warmup)
        return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * share))

    for step in range(per_epoch * epochs):
        found = warmup_cosine(
            step, warmup=per_epoch * warmup, total=per_epoch * epochs, peak=lr, end=min_lr
        )
        assert found == pytest.approx(original(step / per_epoch), rel=1e-12)


@pytest.mark.parametrize(
    ("length", "warmup", "expected"),
    [
        ("20ep", "2ep", (140, 14, 0)),
        ("100st", "2ep", (100, 14, 0)),
        ("20ep", "30st", (140, 30, 0)),
        ("1.5ep", "0.5ep", (10, 4, 0)),
        ("20ep", "0ep", (140, 0, 0)),
        # Longer than half of the run: shortened to it, and what was asked for is kept to be said.
        ("10ep", "10ep", (70, 35, 70)),
        ("1st", "10ep", (1, 0, 70)),
        ("0.01ep", "0st", (1, 0, 0)),
    ],
)
def test_lengths_are_resolved_to_steps(length, warmup, expected):
    schedule = Schedule(RunConfig(length=length), OptimConfig(warmup=warmup), steps_per_epoch=7)
    assert (schedule.total, schedule.warmup, schedule.shortened) == expected


def test_the_rate_of_a_run():
    """Peak from the batch size, or as given; 0 at first, the end beyond the last step."""
    run = RunConfig(length="10ep")
    scaled = OptimConfig(base_lr=1e-3, batch_size=512, warmup="2ep", min_lr=1e-5)
    schedule = Schedule(run, scaled, steps_per_epoch=10)
    assert scaled.peak_lr == pytest.approx(2e-3)
    assert schedule.lr(0) == 0
    assert schedule.lr(20) == pytest.approx(2e-3)
    assert schedule.lr(60) == pytest.approx((2e-3 + 1e-5) / 2)
    assert schedule.lr(100) == pytest.approx(1e-5)
    assert OptimConfig(base_lr=1e-3, batch_size=512, lr=0.3).peak_lr == 0.3
    assert Length.parse("2.5ep", "x").steps(10) == 25


def test_the_peak_within_the_warmup():
    """DINO's warm-up, numpy.linspace(0, peak, n): its last step has the peak already."""
    optim = OptimConfig(lr=2.0, warmup="5st", min_lr=0.5)
    schedule = Schedule(RunConfig(length="15st"), optim, 3, peak_in_warmup=True)
    assert [schedule.lr(s) for s in range(6)] == pytest.approx([0, 0.5, 1.0, 1.5, 2.0, 2.0])
    assert schedule.lr(10) == pytest.approx(1.25)
    one = Schedule(RunConfig(length="15st"), OptimConfig(warmup="1st"), 3, peak_in_warmup=True)
    assert one.lr(0) == 0
    none = Schedule(RunConfig(length="15st"), OptimConfig(warmup="0st"), 3, peak_in_warmup=True)
    assert none.lr(0) == none.optim.peak_lr


def test_weight_decay_of_a_step():
    """Constant, or half a cosine from start to end."""
    run = RunConfig(length="100st")
    assert Schedule(run, OptimConfig(weight_decay=0.3), 10).weight_decay(70) == 0.3
    schedule = Schedule(run, OptimConfig(weight_decay=0.04, weight_decay_end=0.4), 10)
    found = [schedule.weight_decay(s) for s in (0, 50, 100)]
    assert found == pytest.approx([0.04, 0.22, 0.4])


def test_a_frozen_encoder_is_released_linearly():
    run = RunConfig(length="40st")
    held = PretrainOptim(freeze_encoder="10%", release="4st", warmup="0st")
    schedule = Schedule(run, held, 10)
    assert (schedule.frozen, schedule.released) == (4, 4)
    found = [schedule.encoder_share(step) for step in range(10)]
    assert found == [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert Schedule(run, PretrainOptim(freeze_encoder="1st"), 10).encoder_share(1) == 1
    assert Schedule(run, OptimConfig(), 10).encoder_share(0) == 1


def test_a_share_is_of_what_is_part_of_a_run_only():
    with pytest.raises(UserError, match=r"--run.length is '10%'; allowed: epochs as 10ep, or"):
        RunConfig(length="10%")
    with pytest.raises(UserError, match="allowed: epochs as 10ep, a share of the run as 10%, or"):
        PretrainOptim(release="long")


# --- the optimizer ------------------------------------------------------------------------------


def test_weight_matrices_decay_and_vectors_do_not():
    """Every trained parameter is in exactly one group; fixed ones are in none."""
    task = toy()
    config = OptimConfig(weight_decay=0.3, betas=(0.8, 0.9), lr=0.5)
    optimizer = make_optimizer(task, config)
    names = {p: n for n, p in task.named_parameters()}
    groups = [{names[p] for p in group["params"]} for group in optimizer.param_groups]
    assert groups == [{"linear.weight", "token"}, {"linear.bias", "norm.weight", "norm.bias"}]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


class Scaled(Toy):
    """One whose weights are slower, the lower they are."""

    def lr_scale(self, name: str) -> float:
        return {"linear.weight": 0.25, "linear.bias": 0.25, "token": 0.5}.get(name, 1.0)


def test_rates_are_scaled_by_parameter_and_decay_only_where_it_applies():
    task = Scaled()
    optimizer = make_optimizer(task, OptimConfig(weight_decay=0.3, lr=0.5))
    set_rates(optimizer, 0.2, 0.1)
    names = {p: n for n, p in task.named_parameters()}
    found = {
        names[p]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found == {
        "linear.weight": (0.05, 0.1),
        "linear.bias": (0.05, 0.0),
        "token": (0.1, 0.1),
        "norm.weight": (0.2, 0.0),
        "norm.bias": (0.2, 0.0),
    }
    assert len(optimizer.param_groups) == 4


class Placed(Toy):
    """One whose linear map is an encoder's first layer, of four."""

    def place_of(self, name: str) -> Place:
        return Place(True, 2, name == "linear.weight") if name.startswith("linear") else Place()


def test_the_encoder_is_slower_by_its_layers_and_by_the_step():
    task = Placed()
    held = PretrainOptim(encoder_lr=0.5, layer_decay=0.9, patch_lr=0.2)
    optimizer = make_optimizer(task, held)
    set_rates(optimizer, 1.0, 0.1, encoder=0.25)
    names = {p: n for n, p in task.named_parameters()}
    groups = optimizer.param_groups
    found = {names[p]: group["lr"] for group in groups for p in group["params"]}
    slow = 0.25 * 0.5 * 0.81
    assert found.pop("linear.weight") == pytest.approx(slow * 0.2)
    assert found.pop("linear.bias") == pytest.approx(slow)
    assert set(found.values()) == {1.0}


# --- clipping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.5, 3.0, 1e6])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_clipping_the_global_norm_is_torchs(clip, scale):
    task, reference = toy(), toy()
    ours, theirs = give_gradients(task, 1, scale), give_gradients(reference, 1, scale)
    norm = clip_gradients(ours, OptimConfig(clip=clip))
    expected = torch.nn.utils.clip_grad_norm_(theirs, clip or math.inf)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("clip", [0.5, 3.0])
def test_clipping_each_parameter_is_a_loop_of_torchs(clip):
    """The norm that is reported is still the global one, before clipping."""
    task, reference = toy(), toy()
    ours, theirs = give_gradients(task, 2), give_gradients(reference, 2)
    expected = torch.cat([p.grad.flatten() for p in theirs]).norm()
    norm = clip_gradients(ours, OptimConfig(clip=clip, clip_by="parameter"))
    for parameter in theirs:
        torch.nn.utils.clip_grad_norm_([parameter], clip)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_clipping_passes_over_parameters_without_a_gradient():
    task = toy()
    trained = give_gradients(task, 3)
    trained[0].grad = None
    norm = clip_gradients(trained, OptimConfig(clip=0.1))
    rest = torch.cat([p.grad.flatten() for p in trained[1:]])
    assert float(rest.norm()) == pytest.approx(0.1, rel=1e-4)
    assert norm > 0.1
    assert trained[0].grad is None


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    trained = give_gradients(toy(), 4)
    trained[1].grad[0] = math.inf
    assert not torch.isfinite(clip_gradients(trained, OptimConfig(clip=1.0)))


# --- the guarded step ---------------------------------------------------------------------------


def state_of(task: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Parameters, moments and step counters, copied."""
    found = [p.detach().clone() for p in task.parameters()]
    for parameter in optimizer.state:
        found += [v.detach().clone() for v in optimizer.state[parameter].values()]
    return found


@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(bad_step):
    """Neither parameters nor moments nor step counters, at first and later; the next ones work."""
    task, reference = toy(), toy()
    config = OptimConfig(lr=0.1, weight_decay=0.1)
    optimizer = make_optimizer(task, config)
    plain = make_optimizer(reference, config)
    count = len(list(task.parameters()))
    for step in range(4):
        if step == bad_step:
            give_gradients(task, 99, scale=math.nan)
            before = state_of(task, optimizer)
            guarded_step(optimizer, torch.tensor(False))
            after = state_of(task, optimizer)
            # The first step creates the moments, which then are zero.
            before += [torch.zeros_like(v) for v in after[len(before) :]]
            assert len(after) == count + 3 * 5
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        give_gradients(task, step)
        guarded_step(optimizer, torch.tensor(True))
        give_gradients(reference, step)
        plain.step()
    for a, b in zip(state_of(task, optimizer), state_of(reference, plain), strict=True):
        assert torch.equal(a, b)


def test_the_guarded_step_is_adamw():
    """Against the unfused optimizer of torch and its formula for one parameter."""
    task, reference = toy(), toy()
    config = OptimConfig(lr=0.1, weight_decay=0.2, betas=(0.8, 0.95))
    optimizer = make_optimizer(task, config)
    plain = torch.optim.AdamW(
        [
            {"params": [reference.token, reference.linear.weight], "weight_decay": 0.2},
            {"params": [*reference.norm.parameters(), reference.linear.bias], "weight_decay": 0.0},
        ],
        lr=0.1,
        betas=(0.8, 0.95),
        foreach=False,
        fused=False,
    )
    start, m, v = task.token.detach().clone(), 0.0, 0.0
    for step in range(1, 4):
        give_gradients(task, step)
        give_gradients(reference, step)
        gradient = task.token.grad.clone()
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        update = (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        start = start - 0.1 * 0.2 * start - 0.1 * update
        guarded_step(optimizer, torch.tensor(True))
        plain.step()
    torch.testing.assert_close(task.token.detach(), start)
    for a, b in zip(task.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_clipping_by_network(clip):
    """Each network's gradients as one tensor; those without a gradient do not count."""
    torch.manual_seed(0)
    trained = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 2, 5)]
    for i, parameter in enumerate(trained[:3]):
        parameter.grad = (i + 1) * torch.randn_like(parameter)
    before = [p.grad.clone() for p in trained[:3]]
    config = OptimConfig(clip=clip, clip_by="network")
    norm = clip_gradients(trained, config, ["encoder", "head", "encoder", "head"])
    torch.testing.assert_close(norm, torch.cat(before).norm())
    for own in ([0, 2], [1]):
        length = torch.cat([before[i] for i in own]).norm()
        for i in own:
            torch.testing.assert_close(trained[i].grad, before[i] * min(1, clip / (length + 1e-6)))


def test_the_peak_rate_by_both_rules():
    """The square root's base is the rate of 1024 images."""
    assert OptimConfig(batch_size=1024, base_lr=4e-3, lr_rule="sqrt").peak_lr == 4e-3
    assert OptimConfig(batch_size=2304, base_lr=4e-3, lr_rule="sqrt").peak_lr == pytest.approx(6e-3)
    assert OptimConfig(batch_size=512, base_lr=1e-3).peak_lr == pytest.approx(2e-3)
    assert OptimConfig(batch_size=512, base_lr=1e-3, lr=0.5, lr_rule="sqrt").peak_lr == 0.5
