"""A training step on CUDA: it has the CPU's numbers, the host waits for nothing, NaN moves nothing.

Every method that ``methods/`` holds, and fine-tuning.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from ssl_vit.benchmarks.speed import trainer_midway
from ssl_vit.commands.pretraining import Pretraining
from ssl_vit.common.config import OptimConfig, RunConfig
from ssl_vit.common.errors import RunFailed
from ssl_vit.common.seeds import uniform
from ssl_vit.data.batch import Batch
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.photometric import Photometric, photometric
from ssl_vit.evaluators.options import TuneConfig
from ssl_vit.methods import method_names
from ssl_vit.model.execution import choose_attention
from ssl_vit.training.failures import memory_of_a_step
from ssl_vit.training.loop import Trainer
from tests.contract import tiny
from tests.contract.test_rotary import ROTARY
from tests.unit.commands.test_finetune import batch as image_batch
from tests.unit.commands.test_finetune import tuned

CPU = torch.device("cpu")
DROPS = ("--encoder.drop-path", "0.4")
# A method and its options, by a name.
CASES: dict[str, tuple[str, ...]] = {name: (name, *DROPS) for name in method_names()}
CASES["dino-rotary"] = ("dino", *DROPS, *ROTARY)


def session(name: str, device: torch.device, *more: str) -> Pretraining:
    """A tiny run put together for the device, with stochastic depth, after its first step: at step
    0 of a warm-up the rate is 0, and nothing would move."""
    made = tiny.session(*CASES[name], "--run.device", str(device), *more)
    made.task.train()
    made.trainer.step = 1
    return made


def advance(trainer: Trainer, batch: Batch) -> dict[str, Tensor]:
    """One step, which is counted."""
    scalars = trainer.update([batch])
    trainer.step += 1
    return scalars


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, buffers, moments and counters, on the CPU."""
    names = {parameter: name for name, parameter in trainer.task.named_parameters()}
    found = dict(trainer.task.state_dict())
    for parameter, values in trainer.optimizer.state.items():
        found |= {f"{names[parameter]}::{key}": value for key, value in values.items()}
    return {name: value.detach().cpu().clone() for name, value in found.items()}


def assert_near(found: Tensor, expected: Tensor, name: str) -> None:
    """Alike but for rounding, by the size of the whole tensor."""
    apart = (found.cpu().double() - expected.cpu().double()).norm()
    assert apart <= 1e-4 * expected.double().norm() + 1e-7, f"{name}: {apart:.2g}"


def assert_same_gradients(one: Pretraining, two: Pretraining) -> None:
    """Gradients of the last step are alike."""
    pairs = zip(one.task.named_parameters(), two.task.parameters(), strict=True)
    for (key, theirs), ours in pairs:
        assert (theirs.grad is None) == (ours.grad is None), key
        if theirs.grad is not None and not key.endswith("attn.qkv.bias"):  # of keys: only rounding
            assert_near(ours.grad, theirs.grad, key)


def assert_same_state(first: dict[str, Tensor], one: Pretraining, two: Pretraining) -> None:
    """All that two steps have moved is alike: weights by their movement, for AdamW makes whole
    steps of rounding; moments, and a centre, by what they are."""
    after, there = state(one.trainer), state(two.trainer)
    assert after.keys() == there.keys()
    tasks = [{key: found[key] for key in first} for found in (after, there)]
    tiny.assert_same_training(first, *tasks)
    weights = {key for key, _ in one.task.named_parameters()}
    moved = {key for key in first if not torch.equal(first[key], after[key])}
    assert moved & weights
    moments = {key for key in after if "::" in key and "attn.qkv.bias" not in key}
    assert moments
    for key in moments | moved - weights:
        assert_near(there[key], after[key], key)


@pytest.mark.parametrize("name", CASES)
def test_two_steps_have_the_cpus_numbers(name, device):
    """Views, losses, gradients, and all that has moved: moments, teacher and centre, too. The CPU
    leaves out what stochastic depth drops, which the GPU computes: both drop the same."""
    one, two = session(name, CPU), session(name, device)
    if device.type == "cpu":  # a rehearsal takes the GPU's way, too
        choose_attention(two.task, torch.device("cuda", 0))
    first = tiny.state(one.task)
    for key, value in two.task.state_dict().items():
        assert torch.equal(value.cpu(), first[key]), key
    loaded = tiny.batches(one)
    batches = [next(loaded), next(loaded)]
    views = [
        made.trainer.normalize(batches[0].views.to(where))
        for made, where in ((one, CPU), (two, device))
    ]
    for theirs, ours in zip(views[0].crops, views[1].crops, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
    for batch in batches:
        expected, found = (advance(made.trainer, batch) for made in (one, two))
        for key in ("loss", "grad_norm"):
            assert found[key].item() == pytest.approx(expected[key].item(), rel=1e-4), key
        assert_same_gradients(one, two)
    assert_same_state(first, one, two)


def test_draws_are_the_same_bits(device):
    keys = torch.arange(-5, 1000) * 7919
    assert torch.equal(uniform(keys.to(device), 9).cpu(), uniform(keys, 9))


@contextmanager
def no_wait(device: torch.device) -> Iterator[None]:
    """Inside, a wait of the host for the device is an error."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("where", ["host", "device"])
def test_colours_are_the_cpus(where, device):
    """Of RGB: hue, saturation and grayscale, blur and solarise, by parameters on either side;
    the host waits for nothing."""
    spec, rng = Photometric(jitter=0.8, gray=0.2, blur=0.5, solarize=0.2), random.Random(0)
    drawn = torch.tensor([spec.draw(rng) for _ in range(64)])
    images = torch.rand(64, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    expected = photometric(images.clone(), drawn, bounded=True)
    there = images.to(device, copy=True)
    drawn = drawn.to(device) if where == "device" else drawn
    with no_wait(device):
        found = photometric(there, drawn, bounded=True)
    # Rounding may tip a value over the threshold of solarise.
    apart = (found.cpu() - expected).abs() > 1e-4
    assert apart.float().mean() < 1e-3
    assert (expected - images).abs().mean() > 0.01


def steps_without_wait(trainer: Trainer, batches: list[Batch], device: torch.device) -> None:
    """Two steps that set things up, and two more; all from pinned memory."""
    trainer.task.train()
    ready = [b.pin_memory() if device.type == "cuda" else b for b in batches]
    for i, batch in enumerate(ready * 2):
        with no_wait(device) if i >= 2 else nullcontext():
            scalars = advance(trainer, batch)
    assert torch.isfinite(scalars["loss"]).item()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_nothing_in_a_step(name, precision, device):
    made = session(name, device, "--run.precision", precision, "--optim.spike", "6")
    made.trainer.step = 0  # four steps are all that there are
    loaded = tiny.batches(made)
    steps_without_wait(made.trainer, [next(loaded), next(loaded)], device)


def test_nor_in_one_of_fine_tuning(device):
    run, optim = RunConfig(length="10ep"), OptimConfig(clip=1.0)
    normalize = Normalize((0.5,) * 3, (0.2,) * 3)
    task = tuned(TuneConfig(drop_path=0.4, ema=0.9))
    trainer = trainer_midway(task, run, optim, normalize, device, torch.bfloat16)
    steps_without_wait(trainer, [Batch(image_batch(key=k)) for k in (1, 2)], device)


@pytest.mark.parametrize("name", CASES)
def test_a_step_that_is_not_finite_moves_nothing(name, device, monkeypatch):
    """Weights, moments, counters, teacher and centre keep their bits; a step before has moved
    them."""
    made = session(name, device)
    loaded, fresh = tiny.batches(made), state(made.trainer)
    advance(made.trainer, next(loaded))
    before, real = state(made.trainer), made.task.forward
    assert [key for key in fresh if not torch.equal(fresh[key], before[key])]

    def poisoned(*args):
        scalars = real(*args)
        return scalars | {"loss": scalars["loss"] * torch.nan}

    monkeypatch.setattr(made.task, "forward", poisoned)
    assert advance(made.trainer, next(loaded))["skipped"].item() == 1
    after = state(made.trainer)
    assert before.keys() == after.keys()
    assert not [key for key in before if not torch.equal(before[key], after[key])]


def test_out_of_memory_is_one_line(device):
    run, optim = RunConfig(), OptimConfig()
    with (
        pytest.raises(RunFailed, match=r"^step 3: out of memory \(.* more were wanted\); give "),
        memory_of_a_step(run, optim, 2),
    ):
        torch.empty(1 << 50, device=device)
