"""Low-rank adapters of an encoder with given weights, for any method."""

import pytest
import torch

from ssl_vit.commands.initial_weights import whole_method
from ssl_vit.common.errors import UserError
from ssl_vit.weights.official import open_weights
from ssl_vit.weights.own_files import ENCODER_FILE
from tests.contract import tiny
from tests.contract.test_training import from_the_first_step, outcome

RANK = 3
AT_ONCE = ("--optim.freeze-encoder", "0st", "--optim.release", "0st", "--optim.lr", "1e-2")


@pytest.fixture
def given(encoder_options: tuple[str, ...]) -> tuple[str, ...]:
    """Options that adapt an encoder's weights."""
    return (*encoder_options, "--init.lora", str(RANK))


@pytest.mark.parametrize("parts", [1, 2])
def test_the_encoder_is_what_it_was_and_the_product(name, given, parts):
    """After training, to 1e-5, by matrices of no higher rank; all else of it has not moved, and
    moments are kept of the adapters alone."""
    whole = (*given, *AT_ONCE, *tiny.splitting(name), "--optim.accumulate", str(parts))
    made = tiny.session(name, *whole)
    task, encoder = made.task, made.task.encoder
    first = tiny.state(encoder)
    tiny.train(made, 2)
    names = {f"vit.blocks.{n}": n for n in task.adapters.names}
    assert len(names) == 4 * len(encoder.vit.blocks)
    for key, value in encoder.state_dict().items():
        moved = value - first[key]
        if key not in names:
            assert not moved.any(), key
            continue
        product = task.adapters.product(names[key])
        torch.testing.assert_close(moved, product, rtol=0, atol=1e-6)
        assert torch.linalg.matrix_rank(product.double(), rtol=1e-4) in range(1, RANK + 1)
    own = set(task.adapters.parameters())
    of_encoder = set(encoder.parameters())
    moments = set(made.trainer.optimizer.state)
    assert own <= moments
    assert not of_encoder & moments
    assert all(p.grad is None for p in of_encoder)


def test_factors_have_the_gradients_of_the_chain_rule(name, given):
    """Against autograd through W + up @ down, in one step of gradients."""
    made = tiny.session(name, *given, *AT_ONCE)
    task = made.task.train()
    blocks = dict(task.encoder.vit.blocks.named_parameters())
    for factor in task.adapters.up.values():
        torch.nn.init.normal_(factor, std=0.02)
    views = tiny.first_views(made)
    whole = {n: blocks[n].detach().clone() for n in task.adapters.names}
    found: dict[str, torch.Tensor] = {}
    for n in task.adapters.names:
        blocks[n].register_hook(lambda grad, n=n: found.__setitem__(n, found.get(n, 0) + grad))
    torch.manual_seed(0)
    task(views, 0)["loss"].backward()
    task.before_update(0)
    for n in task.adapters.names:
        key = n.replace(".", "_")
        down, up = (
            f[key].detach().clone().requires_grad_() for f in (task.adapters.down, task.adapters.up)
        )
        ((whole[n] + up @ down) * found[n]).sum().backward()
        torch.testing.assert_close(task.adapters.down[key].grad, down.grad)
        torch.testing.assert_close(task.adapters.up[key].grad, up.grad)


def test_a_run_goes_on_to_the_bit_and_exports_a_plain_encoder(name, given, tmp_path):
    one, two = from_the_first_step(name, tmp_path, *given, *AT_ONCE)
    assert outcome(two) == outcome(one)
    opened = open_weights(one / ENCODER_FILE).encoder.state_dict()
    expected = whole_method(one).exported_encoder().state_dict()
    assert opened.keys() == expected.keys()
    assert all(torch.equal(opened[k], expected[k]) for k in opened)


def test_without_given_weights_they_are_refused(name):
    with pytest.raises(UserError, match=r"--init.lora is 3; it adapts given weights"):
        tiny.options(name, "--init.lora", "3")
