"""Blocks that compute their activations again: the same gradients, from less memory."""

import copy
import dataclasses
import threading

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ssl_vit.common.errors import UserError
from ssl_vit.common.task import Task, Views
from ssl_vit.model.drop_path import batch_share
from ssl_vit.model.execution import checkpoint_activations
from tests.unit.methods import test_dino, test_mae

IMAGES = 6


def make(method: str) -> tuple[Task, Views]:
    """A tiny method with stochastic depth, the same each time, and a batch for it."""
    if method == "dino":
        encoder = dataclasses.replace(test_dino.ENCODER, depth=4, drop_path=0.5)
        return test_dino.dino(encoder=encoder).train(), test_dino.batch(IMAGES)
    task = test_mae.make(depth=4, drop_path=0.5).train()
    return task, test_mae.batch(task, IMAGES)


def loss_of(task: Task, views: Views) -> torch.Tensor:
    """The loss of a share; torch's generator would give something else each time."""
    with batch_share(1, 2, IMAGES, key=5):
        return task(views, 0)["loss"]


def gradients(task: Task) -> dict[str, torch.Tensor]:
    """All gradients; they are the task's no more."""
    found = {n: p.grad for n, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys() != set()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_gradients_are_the_same_bit_for_bit(method):
    """In a share or out of it, and where backward runs in another thread, as on GPUs."""
    (task, views), (plain, _) = make(method), make(method)
    checkpoint_activations(task)
    assert task.state_dict().keys() == plain.state_dict().keys()
    loss_of(plain, views).backward()
    expected = gradients(plain)
    loss_of(task, views).backward()
    assert_equal(gradients(task), expected)
    with batch_share(0, 1, IMAGES, key=6):
        loss_of(task, views).backward()
    assert_equal(gradients(task), expected)
    thread = threading.Thread(target=loss_of(task, views).backward)
    thread.start()
    thread.join()
    assert_equal(gradients(task), expected)
    for each in (plain, task):
        torch.manual_seed(3)
        each(views, 0)["loss"].backward()
    outside = gradients(plain)
    assert_equal(gradients(task), outside)
    assert any(not torch.equal(outside[n], value) for n, value in expected.items())


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_less_is_kept_for_backward(method):
    """Of activations, in training alone; in evaluation blocks are as they were."""

    def kept(task: Task, views: Views) -> int:
        weights = {p.untyped_storage().data_ptr() for p in task.parameters()}
        seen: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_of(task, views)
        return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())

    task, views = make(method)
    before, evaluating = kept(task, views), kept(task.eval(), views)
    checkpoint_activations(task.train())
    assert kept(task, views) < 0.5 * before
    assert kept(task.eval(), views) == evaluating


def test_a_copy_learns_by_its_own_weights():
    task, views = make("dino")
    loss_of(task, views).backward()
    expected = gradients(task)
    checkpoint_activations(task)
    twin = copy.deepcopy(task)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.fill_(float("nan"))
    loss_of(twin, views).backward()
    assert not gradients(task)
    assert_equal(gradients(twin), expected)


def test_there_must_be_blocks():
    with pytest.raises(UserError, match="activation-checkpointing is for plain ViTs"):
        checkpoint_activations(nn.Linear(2, 2))
