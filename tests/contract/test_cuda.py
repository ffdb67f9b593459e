"""A step on CUDA without a GPU: on fake tensors, which have a device and a shape, and no numbers.

What differs there from the CPU is run. Only the backward pass is not, which needs the driver: it is
given gradients.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.benchmarks.speed import trainer_midway
from ssl_vit.common.config import OptimConfig, RunConfig
from ssl_vit.common.task import Task
from ssl_vit.data import photometric
from ssl_vit.data.batch import Batch
from ssl_vit.data.normalize import Normalize
from ssl_vit.evaluators.options import TuneConfig
from ssl_vit.model.architecture import without_memory
from ssl_vit.model.rope import Augmentation
from ssl_vit.training.loop import Trainer
from tests.contract import tiny
from tests.contract.test_cost import weightless
from tests.contract.test_rotary import ROTARY
from tests.unit.commands.test_finetune import batch as image_batch
from tests.unit.commands.test_finetune import tuned

pytestmark = pytest.mark.filterwarnings("ignore:.*[Dd]isabling autocast")

GPU = torch.device("cuda", 0)
Shapes = list[tuple[int, ...]]


class Attention(TorchFunctionMode):
    """The shapes of queries and of keys that fused attention is called with, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Shapes = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.shapes.append((*args[0].shape, *args[1].shape))
        return function(*args, **(kwargs or {}))


class BlockingCopies(TorchDispatchMode):
    """Copies from the host to the device that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, kwargs = function(*args, **(kwargs or {})), kwargs or {}
        if function is torch.ops.aten._to_copy.default:
            blocks = not kwargs.get("non_blocking") and args[0].device.type != out.device.type
            self.found += [f"{args[0].device} -> {out.device}: {tuple(out.shape)}"] * blocks
        return out


def with_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the host's alone, with numbers also where all else is fake."""

    def real(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return real


def gradients(loss: Tensor, *_: Any) -> None:
    """In place of a backward pass: some gradient for each parameter that is trained."""
    for parameter in gradients.trained:  # type: ignore[attr-defined]
        parameter.grad = torch.zeros_like(parameter)


@contextmanager
def on_fake_cuda(
    monkeypatch: pytest.MonkeyPatch, task: Task, normalize: Normalize
) -> Iterator[Trainer]:
    """A trainer of a task without memory, in the middle of its schedule, on the fake device."""
    run, optim = RunConfig(length="10ep"), OptimConfig(clip=1.0, spike=4.0)
    for name in ("set_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(Augmentation, "draw", with_numbers(Augmentation.draw))
    # As if each operation had been drawn for half of the images.
    monkeypatch.setattr(photometric, "masked_rows", lambda mask: torch.arange(len(mask) // 2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        task.to_empty(device=GPU)
        task.to = lambda *_: task  # type: ignore[assignment] # it is there: fakes cannot be moved
        trainer = trainer_midway(task, run, optim, normalize, GPU, torch.float32)
        trainer.pace = nullcontext()  # type: ignore[assignment]
        gradients.trained = trainer.trained  # type: ignore[attr-defined]
        monkeypatch.setattr(Tensor, "backward", gradients)
        trainer.task.train()
        yield trainer


def shapes_of(trainer: Trainer, batches: Callable[[], Batch], steps: int) -> list[Shapes]:
    """Attention's shapes in each of some steps; that nothing of the host's is waited for."""
    found = []
    with BlockingCopies() as copies:
        for _ in range(steps):
            with Attention() as seen:
                scalars = trainer.update([batches()])
            trainer.step += 1
            found.append(seen.shapes)
    assert all(value.device == GPU for value in scalars.values())
    assert not copies.found
    return found


DROPS = ("--encoder.drop-path", "0.4")
ENCODERS = {"plain": DROPS, "rotary": (*DROPS, *ROTARY)}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_whole_step_on_cuda(name, kind, encoder, monkeypatch):
    """Nothing of it is on another device, nothing is read from it, no copy to it is waited for; and
    attention has the same shapes whatever stochastic depth draws."""
    more = ENCODERS[encoder]
    config, task = tiny.options(name, *more)[1], weightless(kind, name, *more)
    task.set_length(tiny.STEPS, 2)
    batch = next(tiny.batches(tiny.session(name)))
    normalize = Normalize(config.data.mean, config.data.std)
    with on_fake_cuda(monkeypatch, task, normalize) as trainer:
        shapes = shapes_of(trainer, lambda: dataclasses.replace(batch), steps=2)
    assert shapes[0]
    assert shapes[0] == shapes[1]


def test_a_whole_step_of_fine_tuning(monkeypatch):
    """Of its own augmentation, too."""
    tune = TuneConfig(drop_path=0.4)
    with without_memory():
        task = tuned(tune)
    normalize = Normalize((0.5,) * 3, (0.2,) * 3)
    with on_fake_cuda(monkeypatch, task, normalize) as trainer:
        shapes = shapes_of(trainer, lambda: Batch(image_batch()), steps=3)
    assert len(shapes[0]) == 2
    assert shapes[0] == shapes[1] == shapes[2]
